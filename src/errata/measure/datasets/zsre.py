"""zsRE (Levy et al. 2017) in the form of MEND: questions, answered after a space.

The neighbour is a Natural Questions question with its own answer, asked as the reference code
does: `nq question: ...?`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.errors import DatasetError
from errata.measure.datasets.records import Record, collect, load, sentence
from errata.requests import Case, Probe


def read(path: Path | str, limit: int | None = None) -> list[Case]:
    """The first `limit` usable cases of a zsRE file; the log says how many were skipped and why.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return cases(load(path), source=str(path), limit=limit)


def cases(records: Sequence[Any], *, source: str = "zsRE", limit: int | None = None) -> list[Case]:
    """The same for records in memory; `source` names them in messages."""
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
