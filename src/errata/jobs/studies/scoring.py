"""Scores of a unit's cases, as the rows of a study keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.jobs.studies.units import Unit
from errata.lm.load import LanguageModel
from errata.measure.editing import COMPARISONS, Comparison, Unedited, compared, unedited
from errata.measure.metrics import Consistency
from errata.measure.score import PROTOCOLS, score
from errata.progress import Progress, silent
from errata.requests import Case, Request

CaseRow = dict[str, Any]
"""Of one case: case_id, relation, metrics, its free texts, and whether its request failed."""

KEPT = ("case_id", "relation", "metrics", "texts")


Before = Mapping[str, Unedited]
"""Case id -> what the unedited model answers where it must stay."""


def unedited_answers(lm: LanguageModel, cases: Sequence[Case], unit: Unit) -> Before:
    """What the model, unedited as it is now, answers: as far as the unit compares with that."""
    if not (comparisons := _comparisons(unit)):
        return {}
    found = unedited(lm, cases, comparisons)
    return {case.case_id: one for case, one in zip(cases, found, strict=True)}


def scored(
    lm: LanguageModel,
    cases: Sequence[Case],
    unit: Unit,
    before: Before,
    *,
    texts: int = 0,
    progress: Progress = silent,
) -> list[CaseRow]:
    """Score the model as it is now.

    Args:
        lm: the model.
        cases: what to ask; each has an id.
        unit: says which metrics.
        before: `unedited_answers` of these cases.
        texts: let the model write freely about so many of them, from the first; may be negative.
        progress: called with (stage, done, total).
    """
    texts = max(texts, 0)
    rows: list[CaseRow] = []
    protocols = [name for name in PROTOCOLS if name in unit.metrics]
    for part, generation in ((cases[:texts], True), (cases[texts:], False)):
        if part and (protocols or generation):
            rows += score(
                lm,
                part,
                protocols=protocols,
                generation=generation,
                seed=unit.seed,
                progress=progress,
            ).rows
        else:
            about = ({"case_id": case.case_id, "relation": case.relation} for case in part)
            rows += [one | {"metrics": {}, "texts": []} for one in about]
    if comparisons := _comparisons(unit):
        found = compared(lm, cases, [before[case.case_id] for case in cases], comparisons)
        for row, measured in zip(rows, found, strict=True):
            row["metrics"] |= measured
    return [{name: row[name] for name in KEPT} | {"failed": False} for row in rows]


def _comparisons(unit: Unit) -> list[Comparison]:
    return [name for name in COMPARISONS if name in unit.metrics]


def mark_failed(rows: Sequence[CaseRow], cases: Sequence[Case], written: Sequence[Request]) -> None:
    """Say of each case whether its request is not among those that were written."""
    known = set(written)
    for row, case in zip(rows, cases, strict=True):
        row["failed"] = case.request not in known


def texts_wanted(unit: Unit, cases: int) -> int:
    """Of how many of the first cases the unit wants free text."""
    if not unit.generation:
        return 0
    return min(cases, cases if unit.generation_count is None else unit.generation_count)


def consistent(rows: Sequence[CaseRow], cases: Sequence[Case]) -> None:
    """Measure consistency (RS) with all cases' references, however they were put into batches.

    `score` weighs words by how rare they are among the references of one call, which differ from
    batch to batch.
    """
    references = {case.case_id: case.references for case in cases if case.references}
    wanted = [row for row in rows if row["texts"] and row["case_id"] in references]
    if wanted:
        consistency = Consistency(list(dict.fromkeys(t for r in references.values() for t in r)))
        for row in wanted:
            row["metrics"]["RS"] = consistency(row["texts"], references[row["case_id"]])


def small(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a case for good: not its texts, and `failed` only where it is true."""
    return {n: v for n, v in row.items() if n != "texts" and (n != "failed" or v)}
