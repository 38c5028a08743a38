"""DialogueNLI (Welleck et al. 2019): does an utterance follow from what a speaker is like?

The published files are read: one JSON list of `sentence1`, `sentence2` and `label`, in spite of
their name `.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.errors import DatasetError
from errata.measure.datasets.labelled import Labelled, collect_labelled, pair
from errata.measure.datasets.records import Record, load

LABELS = ("positive", "neutral", "negative")


def read(source: Path | str, limit: int | None = None) -> list[Labelled]:
    """The first `limit` pairs of a file, or of a data set on the Hub.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return examples(load(source), source=str(source), limit=limit)


def examples(
    records: Sequence[Any], *, source: str = "DialogueNLI", limit: int | None = None
) -> list[Labelled]:
    """The same for records in memory; `source` names them in messages."""
    return collect_labelled(records, _example, source=source, limit=limit)


def _example(record: Record) -> Labelled:
    label = record.text("label")
    if label not in LABELS:
        raise DatasetError(f"{record.where}: {label!r} is none of {', '.join(LABELS)}.")
    return Labelled(pair(record.text("sentence1"), record.text("sentence2")), label)
