"""WikiBio hallucinations (Manakul et al. 2023; Hartvigsen et al. 2023, in EasyEdit's form).

After the beginning of a passage about a person, the model is to write the true next sentence
instead of one that it made up; text of a web page is to stay as likely as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.measure.datasets.records import Record, Unusable, collect, load
from errata.requests import Case, Probe, Request


def read(path: Path | str, limit: int | None = None) -> list[Case]:
    """The first `limit` usable cases of a file; the log says how many were skipped and why.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return cases(load(path), source=str(path), limit=limit)


def cases(
    records: Sequence[Any], *, source: str = "WikiBio", limit: int | None = None
) -> list[Case]:
    """The same for records in memory; `source` names them in messages."""
    return collect(records, _case, source=source, limit=limit)


def _case(record: Record) -> Case:
    prompt, subject = record.text("prompt"), record.text("subject")
    target = record.text("target_new")
    if not target.strip():
        raise Unusable("the new target is empty")
    if not subject or subject not in prompt:
        raise Unusable("the subject is not in the prompt")
    neighbour = Probe(record.text("locality_prompt"), record.text("locality_ground_truth"))
    # The passage opens with its subject, and may name it again.
    return Case(
        request=Request(prompt.replace(subject, "{}", 1), subject, target),
        case_id=str(record.values.get("case_id", "")),
        neighbours=(neighbour,) if neighbour.prompt.strip() and neighbour.answer.strip() else (),
    )
