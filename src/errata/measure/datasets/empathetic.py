"""EmpatheticDialogues (Rashkin et al. 2019): which of 32 emotions does a situation go with?

A conversation's situation, which stands beside each of its utterances, is one example. The
published table names emotions in `context`; a form with numbers from 0 to 31 in `label` is read
too, and keeps its numbers, since it does not say what they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.measure.datasets.labelled import Labelled, collect_labelled
from errata.measure.datasets.records import Record, load


def read(source: Path | str, limit: int | None = None) -> list[Labelled]:
    """The first `limit` situations of a file, or of a data set on the Hub.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return examples(load(source), source=str(source), limit=limit)


def examples(
    records: Sequence[Any], *, source: str = "EmpatheticDialogues", limit: int | None = None
) -> list[Labelled]:
    """The same for records in memory; `source` names them in messages."""
    return collect_labelled(records, _example, source=source, limit=limit)


def _example(record: Record) -> Labelled:
    label = record.text("context") if "context" in record.values else record.label("label")
    return Labelled(record.text("prompt").replace("_comma_", ",").strip(), label)
