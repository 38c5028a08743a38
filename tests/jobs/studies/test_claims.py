"""Differences of cells and verdicts on claims, from results that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from errata.errors import ConfigError
from errata.jobs.studies.claims import judge
from errata.jobs.studies.differences import compared, difference
from errata.jobs.studies.shown import ClaimSpec
from tests.jobs.made_up import RUNS, case, cell, two_seeds


def test_a_difference_is_of_the_cases_that_both_have() -> None:
    found = difference(cell("MEMIT", 16), cell("EMMET", 16), "ES")
    assert found is not None and found.p is not None
    # EMMET fails cases 0 to 11 with seed 0 and 10 to 21 with seed 1, which did not see 0 to 9.
    assert found.first == 1.0
    assert found.second == pytest.approx((10 * 0.5 + 18) / 40)
    assert found.estimate.mean == pytest.approx(found.first - found.second)
    assert 0 < found.estimate.low < found.estimate.mean < found.estimate.high
    assert found.p < 0.01


def test_the_difference_of_s_is_paired() -> None:
    """Both sides draw the same cases, so that two alike sides never differ, whatever is drawn."""
    same = difference(cell("MEMIT", 1), cell("EMMET", 1), "S")
    assert same is not None and same.p == 1.0
    assert same.estimate[:3] == pytest.approx((0, 0, 0), abs=1e-12)
    worse = difference(cell("MEMIT", 16), cell("EMMET", 16), "S")
    assert worse is not None and worse.p is not None and worse.p < 0.01
    assert worse.estimate.mean == pytest.approx(
        cell("MEMIT", 16).summary["S"].mean - cell("EMMET", 16).summary["S"].mean
    )
    assert 0 < worse.estimate.low < worse.estimate.mean < worse.estimate.high


def test_what_is_not_shared_has_no_difference() -> None:
    one, other = two_seeds([case(1, ES=1.0)], []), two_seeds([case(2, ES=1.0)], [])
    assert difference(one, other, "ES") is None
    assert difference(one, other, "GE") is None


def test_two_editors_are_compared_wherever_both_worked() -> None:
    found = compared(RUNS, "MEMIT", "EMMET", ["S", "ES"], ("model", "protocol.batch"))
    assert [one.place for one in found][:2] == [("pocket", 1), ("pocket", 4)]
    assert set(found[0].differences) == {"S", "ES"}
    with pytest.raises(ConfigError, match="no editor 'MEMTI'; there are MEMIT, EMMET, unedited"):
        compared(RUNS, "MEMTI", "EMMET", ["S"], ("model", "protocol.batch"))
    with pytest.raises(ConfigError, match="nowhere asked to do the same"):
        compared(RUNS, "MEMIT", "unedited", ["S"], ("model", "protocol.batch"))


def claim(check: dict[str, Any], **fields: Any) -> ClaimSpec:
    values = {"text": "c", "check": {"metric": "ES", **check}, **fields}
    return ClaimSpec.read(values, "claim 1")


def batch(editor: str, size: int) -> dict[str, Any]:
    return {"editor": editor, "protocol.batch": size, "model": "pocket"}


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        ({"kind": "equal", "a": batch("MEMIT", 1), "b": batch("EMMET", 1), "within": 0.02}, "seen"),
        (
            {"kind": "equal", "a": batch("MEMIT", 1), "b": batch("EMMET", 16), "within": 0.02},
            "not seen",
        ),
        (
            {"kind": "equal", "a": batch("MEMIT", 1), "b": batch("EMMET", 4), "within": 0.02},
            "undecided",
        ),
        ({"kind": "greater", "a": batch("MEMIT", 16), "b": batch("EMMET", 16)}, "seen"),
        ({"kind": "greater", "a": batch("EMMET", 16), "b": batch("MEMIT", 16)}, "not seen"),
        ({"kind": "greater", "a": batch("MEMIT", 1), "b": batch("EMMET", 1)}, "not seen"),
        (
            {"kind": "greater", "a": batch("MEMIT", 16), "b": batch("EMMET", 16), "by": 0.3},
            "undecided",
        ),
        (
            {"kind": "greater", "a": batch("MEMIT", 1), "b": batch("EMMET", 1), "by": -0.02},
            "seen",
        ),
        (
            {"kind": "greater", "a": batch("EMMET", 16), "b": batch("MEMIT", 16), "by": -0.02},
            "not seen",
        ),
        ({"kind": "order", "of": [batch("EMMET", n) for n in (4, 16)]}, "seen"),
        ({"kind": "order", "of": [batch("EMMET", n) for n in (1, 16, 4)]}, "not seen"),
        (
            {"kind": "greater", "metric": "GE", "a": batch("MEMIT", 1), "b": batch("EMMET", 1)},
            "undecided",
        ),
    ],
)
def test_verdicts(check: dict[str, Any], verdict: str) -> None:
    (finding,) = judge(claim(check), RUNS).findings
    assert finding.verdict.removesuffix(" here") == verdict


def test_what_need_only_not_be_smaller_is_told_so() -> None:
    check = {"kind": "greater", "a": batch("MEMIT", 1), "b": batch("EMMET", 1), "by": -0.02}
    (finding,) = judge(claim(check), RUNS).findings
    assert finding.evidence[0].says == "no less"


@pytest.mark.parametrize(
    ("within", "verdict", "told"),
    [
        (0.1, "seen here", "on a par up to batch 4, no longer at 16"),
        (0.9, "not seen here", "on a par up to batch 16, the largest that was tried"),
        (0.01, "seen here", "on a par up to batch 1, no longer at 16"),
    ],
)
def test_up_to_where_two_are_equal(within: float, verdict: str, told: str) -> None:
    sides = {"a": {"editor": "MEMIT"}, "b": {"editor": "EMMET"}}
    check = {"kind": "equal until", "along": "protocol.batch", "within": within, **sides}
    found = judge(claim(check, each=["model"]), RUNS).findings
    assert [(one.place, one.verdict, one.told) for one in found] == [
        ("pocket", verdict, told),
        ("pocket-llama", verdict, told),
    ]
    swapped = {"kind": "equal until", "along": "protocol.batch", "within": within}
    found = judge(
        claim({**swapped, "a": sides["b"], "b": sides["a"]}, each=["model"]), RUNS
    ).findings
    assert found[0].verdict != "seen here"  # the one that falls behind must be the second


def test_a_claim_about_nothing_is_refused() -> None:
    check = {"kind": "greater", "a": {"editor": "MEMTI"}, "b": {"editor": "EMMET"}}
    with pytest.raises(ConfigError, match="nothing in this experiment has batch 4, MEMTI"):
        judge(claim(check, where={"protocol.batch": 4}, each=["model"]), RUNS)


def test_a_claim_must_choose_one_cell() -> None:
    check = {"kind": "greater", "a": {"editor": "MEMIT"}, "b": {"editor": "EMMET"}}
    with pytest.raises(ConfigError, match="also differ in batch"):
        judge(claim(check, each=["model"]), RUNS)
