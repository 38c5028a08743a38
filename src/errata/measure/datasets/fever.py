"""FEVER (Thorne et al. 2018), fact checking: is a claim supported or refuted?

Three forms are read: the original (`claim`, `label`), KILT's (`input`, `output`), and De Cao et
al.'s of KILT's, which MEND uses too (`filtered_rephrases` beside). Claims with NOT ENOUGH INFO are
passed over: the papers on editing check facts in two classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.errors import DatasetError
from errata.measure.datasets.labelled import Labelled, collect_labelled
from errata.measure.datasets.records import Record, Unusable, load

LABELS = ("SUPPORTS", "REFUTES")


def read(source: Path | str, limit: int | None = None) -> list[Labelled]:
    """The first `limit` claims of a file, or of a data set on the Hub.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return examples(load(source), source=str(source), limit=limit)


def examples(
    records: Sequence[Any], *, source: str = "FEVER", limit: int | None = None
) -> list[Labelled]:
    """The same for records in memory; `source` names them in messages."""
    return collect_labelled(records, _example, source=source, limit=limit)


def _example(record: Record) -> Labelled:
    if "claim" in record.values:
        text, label = record.text("claim"), record.text("label")
    else:
        outputs = record.inners("output")
        if not outputs:
            raise DatasetError(f"{record.where}: 'output' must hold the answer.")
        text, label = record.text("input"), outputs[0].text("answer")
    if label == "NOT ENOUGH INFO":
        raise Unusable("there is not enough information to tell")
    if label not in LABELS:
        raise DatasetError(f"{record.where}: a claim {' or '.join(LABELS)}, not {label!r}.")
    return Labelled(text, label, record.texts("filtered_rephrases"))
