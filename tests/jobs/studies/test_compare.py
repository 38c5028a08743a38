"""Paired comparisons: against scipy, against theorems, and refused where nothing pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from errata.errors import ConfigError
from errata.jobs.studies.compare import DRAWS, EXACT, bootstrap, compare, sign_flip
from errata.jobs.studies.rows import Row

stats = pytest.importorskip("scipy.stats")


def row(values: Mapping[Any, float] | Sequence[float], **unit: Any) -> Row:
    """A row whose cases have these values of ES, by case id or in order."""
    by_case = values if isinstance(values, Mapping) else dict(enumerate(values))
    cases = tuple({"case_id": case, "metrics": {"ES": value}} for case, value in by_case.items())
    about = {"model": "pocket", "data": "pocket", "seed": 0} | unit
    return Row(key=str(about), study="s", unit=about, cases=cases)


def gaussian(n: int, mean: float, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(mean, 1.0, n)


def test_the_difference_is_that_of_the_means_over_common_cases() -> None:
    found = compare([row([1, 0, 1, 0.5])], [row({1: 1, 2: 0.5, 3: 0.5, 9: 0})], "ES")
    assert (found.difference.n, found.wins, found.ties, found.losses) == (3, 1, 1, 1)
    assert found.first == pytest.approx(0.5) and found.second == pytest.approx(2 / 3)
    assert found.difference.mean == pytest.approx(found.first - found.second)


def test_swapping_the_sides_changes_the_sign_alone() -> None:
    a, b = [row(gaussian(40, 0.3))], [row(gaussian(40, 0.0, seed=1))]
    there, back = compare(a, b, "ES"), compare(b, a, "ES")
    assert there.difference.mean == -back.difference.mean
    assert there.p == back.p
    assert (there.wins, there.losses) == (back.losses, back.wins)


def test_the_same_seed_gives_the_same_numbers() -> None:
    a, b = [row(gaussian(60, 0.1))], [row(gaussian(60, 0.0, seed=1))]
    assert compare(a, b, "ES", seed=3) == compare(a, b, "ES", seed=3)
    assert compare(a, b, "ES", seed=3).difference != compare(a, b, "ES", seed=4).difference


def test_order_of_cases_and_rows_does_not_matter() -> None:
    values = gaussian(30, 0.2)
    forward = dict(enumerate(values))
    a = [row(forward, seed=0), row(values[:10], seed=1)]
    b = [row(dict(reversed(forward.items())), seed=1), row(values[:10], seed=0)]
    other = [row(gaussian(30, 0, seed=1))]
    one, two = compare(a, other, "ES"), compare(b, other, "ES")
    assert one.p == two.p and one.difference == two.difference


@pytest.mark.parametrize("n", [5, 9, 12])
def test_p_is_scipys_exact_permutation_test(n: int) -> None:
    d = gaussian(n, 0.6, seed=n)
    scipy = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(d, seed=0) == pytest.approx(scipy.pvalue, abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(7, 1), (30, 12), (5, 5), (600, 500), (0, 3)])
def test_yes_or_no_is_the_exact_sign_test(wins: int, losses: int) -> None:
    d = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 10)
    assert sign_flip(d, seed=0) == pytest.approx(
        stats.binomtest(wins, wins + losses).pvalue, rel=1e-9
    )


def test_many_cases_are_near_the_t_test() -> None:
    d = gaussian(300, 0.1, seed=2)
    assert sign_flip(d, seed=0) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)
    low, high = bootstrap(d, seed=0)
    wanted = stats.ttest_1samp(d, 0).confidence_interval()
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=0.01)


def test_drawn_signs_agree_with_all_signs() -> None:
    d = gaussian(EXACT + 1, 0.4, seed=5)
    exact = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert abs(sign_flip(d, seed=0) - exact) < 4 * math.sqrt(exact * (1 - exact) / DRAWS)


def test_p_is_never_zero() -> None:
    assert sign_flip(gaussian(50, 20.0), seed=0) == 1 / (DRAWS + 1)


def test_chance_is_found_significant_as_often_as_it_says() -> None:
    """Under the null hypothesis p is uniform: 5% of studies are below 5%."""
    rng = np.random.default_rng(0)
    p = [sign_flip(rng.normal(0, 1, 25), seed=i, draws=400) for i in range(1000)]
    assert 0.03 < np.mean(np.array(p) <= 0.05) < 0.07
    assert 0.45 < np.mean(np.array(p) <= 0.5) < 0.55


def test_intervals_hold_the_true_difference() -> None:
    rng = np.random.default_rng(0)
    held = [
        low <= 0.5 <= high
        for low, high in (bootstrap(rng.normal(0.5, 1, 40), seed=i, draws=400) for i in range(1000))
    ]
    assert 0.91 < np.mean(held) < 0.97


def test_equal_groups_do_not_differ() -> None:
    found = compare([row(gaussian(20, 0))], [row(gaussian(20, 0))], "ES")
    assert (found.p, found.ties, tuple(found.difference)) == (1.0, 20, (0.0, 0.0, 0.0, 20))


def test_averages_that_differ_by_rounding_are_ties() -> None:
    a = [row([x], seed=i) for i, x in enumerate((0.1, 0.2, 0.3))]
    b = [row([x], seed=i) for i, x in enumerate((0.3, 0.2, 0.1))]
    assert compare(a, b, "ES").ties == 1


def test_one_pair_has_no_interval() -> None:
    found = compare([row([1])], [row([0])], "ES")
    assert found.p == 1.0 and math.isnan(found.difference.low) and found.difference.n == 1


def test_a_case_counts_once_however_often_it_was_measured() -> None:
    seeds = [row([1, 0], seed=seed) for seed in range(5)]
    models = [row([1, 0], model=model) for model in ("a", "b")]
    others = [row([0, 0], model=model) for model in ("a", "b")]
    assert compare(seeds, [row([0, 0])], "ES").difference.n == 2
    assert compare(models, others, "ES").difference.n == 2


def test_models_are_matched_with_themselves() -> None:
    """Else a group that has only the easy model would win for it."""
    both = [row([0.2, 0.2], model="hard"), row([0.9, 0.9], model="easy")]
    easy = [row([0.8, 0.8], model="easy")]
    assert compare(both, easy, "ES").difference.mean == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="same data, case, model"):
        compare([both[0]], [both[1]], "ES")
    assert compare([both[0]], [both[1]], "ES", matched=()).difference.mean == pytest.approx(-0.7)


def test_the_same_number_in_another_data_set_is_another_case() -> None:
    with pytest.raises(ConfigError, match="no case with ES in common"):
        compare([row([1.0], data="counterfact")], [row([1.0], data="zsre")], "ES")


def test_what_was_not_measured_is_left_out() -> None:
    found = compare([row([1, math.nan, 1])], [row([0, 0, math.nan])], "ES")
    assert found.difference.n == 1


def test_refusals_say_why() -> None:
    rows = [row([1.0, 0.0])]
    with pytest.raises(ConfigError, match="has PS; it has ES"):
        compare(rows, rows, "PS")
    with pytest.raises(ConfigError, match="no rows with cases"):
        compare(rows, [], "ES")
    with pytest.raises(ConfigError, match="infinite"):
        compare([row([math.inf])], rows, "ES")
