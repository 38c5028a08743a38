"""zsRE (Levy et al. 2017) in the form of MEND: questions, answered after a space.

Two forms are read. In the list of records with `src` and `alt` (ROME's evaluation), the neighbour
is a Natural Questions question with its own answer, asked as the reference code does: `nq
question: ...?`. MEND's JSON lines with `input` and `alternatives` have no neighbours of their own:
there it is the next record's question, with what the model answers to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata.errors import DatasetError
from errata.measure.datasets.records import Record, Unusable, collect, load, sentence
from errata.requests import Case, Probe, Request


def read(path: Path | str, limit: int | None = None) -> list[Case]:
    """The first `limit` usable cases of a zsRE file; the log says how many were skipped and why.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return cases(load(path), source=str(path), limit=limit)


def cases(records: Sequence[Any], *, source: str = "zsRE", limit: int | None = None) -> list[Case]:
    """The same for records in memory; `source` names them in messages."""
    if isinstance(records[0], Record) and "alternatives" in records[0].values:
        return _with_neighbours(collect(records, _alternative, source=source, limit=limit))
    return collect(records, _case, source=source, limit=limit)


def _case(record: Record) -> Case:
    answers = record.texts("answers")
    if not answers:
        raise DatasetError(f"{record.where}: 'answers' must hold the true answer.")
    question = record.text("loc").rstrip("? ") + "?"
    return Case(
        request=sentence(
            record.text("src"), record.text("subject"), record.text("alt"), answers[0]
        ),
        case_id=str(record.values.get("case_id", "")),
        paraphrases=(record.text("rephrase"),),
        neighbours=(Probe(question, record.text("loc_ans")),),
    )


def _alternative(record: Record) -> Case:
    alternatives, rephrases = record.texts("alternatives"), record.texts("filtered_rephrases")
    if not alternatives or not rephrases:  # MEND's own rule
        raise Unusable("it has no other answer, or no other wording")
    # The question does not say which of its words are the subject: all of them stand for it.
    request = Request("{}", record.text("input"), alternatives[0], record.text("prediction"))
    return Case(request, str(record.values.get("id", "")), paraphrases=rephrases)


def _with_neighbours(cases: list[Case]) -> list[Case]:
    if len(cases) < 2:
        return cases
    return [
        replace(case, neighbours=(Probe(other.request.text, other.request.true or ""),))
        for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)
    ]
