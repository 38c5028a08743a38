"""MultiNLI (Williams et al. 2018): does one text follow from another?

The published JSON lines (`sentence1`, `sentence2`, `gold_label`) and the Hub's rows (`premise`,
`hypothesis`, a number for `label`) are read; pairs on which the annotators could not agree are
passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.errors import DatasetError
from errata.measure.datasets.labelled import Labelled, collect_labelled, pair
from errata.measure.datasets.records import Record, Unusable, load

LABELS = ("entailment", "neutral", "contradiction")
"""In the order of the Hub's numbers."""


def read(source: Path | str, limit: int | None = None) -> list[Labelled]:
    """The first `limit` pairs of a file, or of a data set on the Hub.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return examples(load(source), source=str(source), limit=limit)


def examples(
    records: Sequence[Any], *, source: str = "MultiNLI", limit: int | None = None
) -> list[Labelled]:
    """The same for records in memory; `source` names them in messages."""
    return collect_labelled(records, _example, source=source, limit=limit)


def _example(record: Record) -> Labelled:
    if "gold_label" in record.values:
        label = record.text("gold_label")
        texts = record.text("sentence1"), record.text("sentence2")
    else:
        number = record.label("label")
        label = dict(zip("012", LABELS, strict=True)).get(number, number)
        texts = record.text("premise"), record.text("hypothesis")
    if label in ("-", "-1"):
        raise Unusable("the annotators did not agree")
    if label not in LABELS:
        raise DatasetError(f"{record.where}: {label!r} is none of {', '.join(LABELS)}.")
    return Labelled(pair(*texts), label)
