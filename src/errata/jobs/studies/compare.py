"""Is one better than the other? Two groups of results, compared case by case.

Both sides have answered the same cases, so each case is compared with itself: what makes a case
hard is in both numbers and cancels. A case counts once, however often it was measured: its values
are averaged over seeds, then the differences of its sides over models (or what else is matched).

Of the n differences d: their mean with a 95% percentile bootstrap over cases, and the two-sided
p-value of the sign-flip permutation test on their mean. If the two sides were exchangeable, each d
could as well have had the other sign; p is the share of the 2^n choices of signs under which
|sum d| is at least what it is. This is exact where all |d| that are not 0 are equal (yes-or-no
metrics; it then is the sign test, McNemar's exact test) and where at most 16 differ from 0;
otherwise signs are drawn at random, and the smallest p that can be told is 1 / (draws + 1).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from errata.errors import ConfigError
from errata.jobs.studies.rows import Row, flat
from errata.measure.metrics import Estimate

Differences = NDArray[np.float64]
"""(n,), one for each case."""

Place = tuple[str, ...]
"""What the sides of a pair share: data, case, and the matched fields, all as text."""

DRAWS = 10_000
"""Resamples of the bootstrap, and choices of signs where they are not all tried."""

EXACT = 16
"""Up to so many differences other than 0, all choices of signs are tried: 65,536."""

_AT_ONCE = 1_000_000
"""Numbers drawn at a time, so that many cases do not fill the memory."""


@dataclass(frozen=True)
class Comparison:
    """How the first group differs from the second in one metric."""

    metric: str
    first: float
    """The first group's mean over the cases that both have."""
    second: float
    difference: Estimate
    """first - second, with its 95% interval; n is the number of pairs."""
    p: float
    """Of the two-sided permutation test; 1 if no case differs."""
    wins: int
    """Cases in which the first is larger (which is not better in every metric)."""
    ties: int
    losses: int


def compare(
    first: Sequence[Row],
    second: Sequence[Row],
    metric: str,
    *,
    matched: Sequence[str] = ("model",),
    seed: int = 0,
) -> Comparison:
    """Compare two units, or two groups of them, over the cases that both have answered.

    Args:
        first: rows with their cases (`Store.get`, or `Store.rows(cases=True)`).
        second: likewise.
        metric: a name in the cases' `metrics`. A case that lacks it, or has NaN, is left out.
        matched: fields of the unit in which the two sides of a pair must agree, beside the data
            and the case; () to compare one model with another.
        seed: of the bootstrap and of the drawn signs.

    Raises:
        ConfigError: the two have no case with this metric in common, or a value is infinite.
    """
    ours, theirs = _values(first, metric, matched), _values(second, metric, matched)
    shared = [place for place in ours if place in theirs]
    if not shared:
        raise ConfigError(_why_nothing_is_shared(first, second, metric, matched))
    of_case: dict[Place, list[tuple[float, float]]] = defaultdict(list)
    for place in shared:
        of_case[place[:2]].append((ours[place], theirs[place]))
    pairs = np.array([np.mean(of_case[case], axis=0) for case in sorted(of_case)])
    differences = _differences(pairs)
    low, high = bootstrap(differences, seed=seed)
    return Comparison(
        metric=metric,
        first=float(pairs[:, 0].mean()),
        second=float(pairs[:, 1].mean()),
        difference=Estimate(float(differences.mean()), low, high, len(differences)),
        p=sign_flip(differences, seed=seed),
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


def bootstrap(differences: Differences, *, seed: int, draws: int = DRAWS) -> tuple[float, float]:
    """95% percentile interval of the mean; NaN for a single case."""
    n = len(differences)
    if n == 1:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    means = [
        differences[random.integers(n, size=(size, n))].mean(axis=1) for size in _sizes(draws, n)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def sign_flip(differences: Differences, *, seed: int, draws: int = DRAWS) -> float:
    """Two-sided p-value of the permutation test on the mean; 1 if all differences are 0."""
    sizes = np.abs(differences[differences != 0])
    n = len(sizes)
    if not n:
        return 1.0
    seen = abs(float(differences.sum())) - 1e-9 * float(sizes.sum())  # equal up to rounding
    if np.ptp(sizes) <= 1e-9 * sizes[0]:
        return _sign_test(int((differences > 0).sum()), n)
    if n <= EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
        return float((np.abs(signs @ sizes) >= seen).mean())
    random = np.random.default_rng(seed)
    as_large = 0
    for size in _sizes(draws, n):
        signs = random.integers(2, size=(size, n)) * 2.0 - 1.0
        as_large += int((np.abs(signs @ sizes) >= seen).sum())
    return (1 + as_large) / (1 + draws)


def _sign_test(wins: int, n: int) -> float:
    """Two-sided exact binomial test of wins among n, each as likely to be won as lost."""
    tail = sum(math.comb(n, k) for k in range(min(wins, n - wins) + 1))
    return min(1.0, tail / (1 << (n - 1)))


def _sizes(draws: int, n: int) -> Iterable[int]:
    """`draws` in parts that fit into memory with n numbers each."""
    part = max(1, _AT_ONCE // n)
    return [min(part, draws - start) for start in range(0, draws, part)]


def _differences(pairs: NDArray[np.float64]) -> Differences:
    """First minus second, exactly 0 where they differ by the rounding of averages alone."""
    found = pairs[:, 0] - pairs[:, 1]
    return np.where(np.abs(found) <= 1e-12 * np.abs(pairs).max(axis=1), 0.0, found)


def _values(rows: Sequence[Row], metric: str, matched: Sequence[str]) -> dict[Place, float]:
    """The metric at each place, averaged over the rows that have measured it there."""
    found: dict[Place, list[float]] = defaultdict(list)
    for row in rows:
        unit = flat(row.unit)
        rest = [str(unit.get(name)) for name in matched]
        for case in row.cases:
            value = case.get("metrics", {}).get(metric)
            if value is None or math.isnan(value):
                continue
            if math.isinf(value):
                raise ConfigError(
                    f"{metric} of case {case['case_id']} is infinite: there is no mean "
                    "difference. Compare another metric."
                )
            found[str(unit.get("data")), str(case["case_id"]), *rest].append(value)
    return {place: float(np.mean(values)) for place, values in found.items()}


def _why_nothing_is_shared(
    first: Sequence[Row], second: Sequence[Row], metric: str, matched: Sequence[str]
) -> str:
    for rows in (first, second):
        if not any(row.cases for row in rows):
            return "there is nothing to compare: one of the two has no rows with cases."
        names = {name for row in rows for case in row.cases for name in case.get("metrics", {})}
        if metric not in names:
            return f"no case of one of the two has {metric}; it has {', '.join(sorted(names))}."
    fields = ", ".join(("data", "case", *matched))
    return f"the two have no case with {metric} in common (same {fields}): nothing pairs them."
