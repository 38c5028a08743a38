"""Claims of the papers, judged by results: seen here, not seen here, or undecided.

A claim is about the difference of a metric between two cells, and is judged by that difference's
95% interval (`errata.jobs.studies.differences`):

- *seen here* if everything in the interval agrees with it;
- *not seen here* if nothing in the interval does;
- *undecided* if the interval holds both, or something is not measured.

"equal" asks for a difference of at most `within`, either way; "greater" for one of more than
`by`, which is negative where it need only not be smaller by that; "order" for each to be greater
than the next. "equal until" asks for two to be equal at the smallest value of a field, and no
longer at a larger one: the two are then on a par up to the last value before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from errata.errors import ConfigError
from errata.jobs.report import estimate_text
from errata.jobs.studies.cells import Cell, Run, cells, matching, places, text
from errata.jobs.studies.differences import Difference, difference
from errata.jobs.studies.shown import EDITS, RELATION, Check, ClaimSpec, Where
from errata.jobs.studies.tables import heading, named, scaled

Verdict = Literal["seen here", "not seen here", "undecided"]

SIGNS: dict[Verdict, tuple[str, str]] = {
    "seen here": ("good", "\N{CHECK MARK}"),
    "not seen here": ("bad", "\N{BALLOT X}"),
    "undecided": ("fair", "\N{MIDDLE DOT}"),
}
"""Verdict -> its tone, and its sign for readers without colours."""


_GREATER: dict[Verdict, str] = {"seen here": "greater", "not seen here": "not greater"}
_NOT_LESS: dict[Verdict, str] = {"seen here": "no less", "not seen here": "less"}
_EQUAL: dict[Verdict, str] = {"seen here": "on a par", "not seen here": "apart"}
WORDS = {"greater": _GREATER, "order": _GREATER, "equal": _EQUAL, "equal until": _EQUAL}
"""Kind of check -> what its verdict on one difference is called."""


@dataclass(frozen=True)
class Evidence:
    """One difference that a verdict rests on."""

    what: str
    """Such as `ROME - MEMIT`, or `batch 64: MEMIT - EMMET`."""
    first: Cell | None
    """None where the experiment has no such cell."""
    second: Cell | None
    difference: Difference | None
    """None where one of the two is not measured."""
    verdict: Verdict
    """Whether the two are equal, or the first is greater, as the check asks."""
    says: str = ""
    """The same in the check's own words."""

    def told(self, metric: str) -> str:
        """The difference for people, such as `0.4 [-0.2, 1.0], p = 0.31, 118 cases`."""
        if self.difference is None:
            return "not measured"
        estimate, p = scaled(self.difference.estimate, metric), self.difference.p
        parts = [" ".join(filter(None, estimate_text(estimate)))]
        parts += [f"p = {p:.2g}"] if p is not None else []
        return ", ".join([*parts, f"{estimate.n} cases"])


@dataclass(frozen=True)
class Finding:
    """The verdict on a claim in one of the places where it is judged."""

    place: str
    """Such as `pocket`; empty if it is judged once."""
    verdict: Verdict
    told: str
    """What was found, in a few words; empty if the verdict says it."""
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Claim:
    """A claim with its verdicts."""

    text: str
    metric: str
    findings: tuple[Finding, ...]


def judge(spec: ClaimSpec, runs: Sequence[Run]) -> Claim:
    """Judge a claim in every place where it is to be judged.

    Raises:
        ConfigError: a side of the claim is nowhere in the experiment, or is not one cell.
    """
    for side in spec.check.of or (spec.check.a, spec.check.b):
        asked = {n: v for n, v in {**spec.where, **side}.items() if n not in (RELATION, EDITS)}
        if not matching(runs, asked):
            raise ConfigError(f"nothing in this experiment has {_named(asked)}.")
    findings = []
    for place in places(runs, spec.each, spec.where):
        here = {**spec.where, **dict(zip(spec.each, place, strict=True))}
        finding = _finding(spec.check, runs, here, named(spec.each, place))
        if any(one.first or one.second for one in finding.evidence):
            findings.append(finding)
    return Claim(spec.text, spec.check.metric, tuple(findings))


def _finding(check: Check, runs: Sequence[Run], here: Where, place: str) -> Finding:
    if check.kind == "equal until":
        return _until(check, runs, here, place)
    pairs = pairwise(check.of) if check.kind == "order" else [(check.a, check.b)]
    evidence = tuple(
        _evidence(
            check,
            _cell(runs, here, a),
            _cell(runs, here, b),
            f"{_named(a)} \N{MINUS SIGN} {_named(b)}",
        )
        for a, b in pairs
    )
    verdicts = {one.verdict for one in evidence}
    verdict: Verdict = "not seen here" if "not seen here" in verdicts else "undecided"
    return Finding(place, "seen here" if verdicts == {"seen here"} else verdict, "", evidence)


def _until(check: Check, runs: Sequence[Run], here: Where, place: str) -> Finding:
    """Equal at first, and no longer at some larger value."""
    ours = cells(runs, (check.along,), {**here, **check.a})
    theirs = cells(runs, (check.along,), {**here, **check.b})
    what, both = heading(check.along), f"{_named(check.a)} \N{MINUS SIGN} {_named(check.b)}"
    values = sorted(value for (value,) in ours if (value,) in theirs)
    evidence = tuple(
        _evidence(check, ours[value,], theirs[value,], f"{what} {text(value)}: {both}")
        for value in values
    )
    apart = [_greater(one.difference, check.within) == "seen here" for one in evidence]
    end = apart.index(True) if any(apart) else len(values)
    par = [
        value
        for value, one in zip(values[:end], evidence[:end], strict=True)
        if one.verdict == "seen here"
    ]
    verdict: Verdict = "undecided"
    told = f"on a par up to {what} {text(par[-1])}" if par else ""
    if values and end == 0:
        verdict, told = "not seen here", f"apart at {what} {text(values[0])} already"
    elif par and end < len(values):
        verdict, told = "seen here", f"{told}, no longer at {text(values[end])}"
    elif values and par == values:
        verdict, told = "not seen here", f"{told}, the largest that was tried"
    return Finding(place, verdict, told, evidence)


def _evidence(check: Check, first: Cell | None, second: Cell | None, what: str) -> Evidence:
    found = difference(first, second, check.metric) if first and second else None
    if check.kind in ("equal", "equal until"):
        verdict = _equal(found, check.within)
    else:
        verdict = _greater(found, check.by)
    words = _NOT_LESS if check.by < 0 else WORDS[check.kind]
    return Evidence(what, first, second, found, verdict, words.get(verdict, verdict))


def _equal(found: Difference | None, within: float) -> Verdict:
    if found and max(abs(found.estimate.low), abs(found.estimate.high)) <= within:
        return "seen here"
    if found and (found.estimate.low > within or found.estimate.high < -within):
        return "not seen here"
    return "undecided"


def _greater(found: Difference | None, by: float) -> Verdict:
    if found and found.estimate.low > by:
        return "seen here"
    if found and found.estimate.high <= by:
        return "not seen here"
    return "undecided"


def _cell(runs: Sequence[Run], here: Where, side: Where) -> Cell | None:
    return cells(runs, (), {**here, **side}).get(())


def _named(side: Where) -> str:
    return named(tuple(side), tuple(side.values()))
