"""PersuasionForGood (Wang et al. 2019): what does a persuader's sentence try?

The annotated dialogues, saved as a table from the published `300_dialog.xlsx`, name the strategy
of each sentence of the persuader (`er_label_1`). The full dialogues (`full_dialog.csv`) have no
strategies; there the label says who speaks, the persuader or the persuadee.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.errors import DatasetError
from errata.measure.datasets.labelled import Labelled, collect_labelled
from errata.measure.datasets.records import Record, Unusable, load

ROLES = {"0": "persuader", "1": "persuadee"}
STRATEGY = "er_label_1"


def read(source: Path | str, limit: int | None = None) -> list[Labelled]:
    """The first `limit` sentences of a file.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return examples(load(source), source=str(source), limit=limit)


def examples(
    records: Sequence[Any], *, source: str = "PersuasionForGood", limit: int | None = None
) -> list[Labelled]:
    """The same for records in memory; `source` names them in messages."""
    return collect_labelled(records, _example, source=source, limit=limit)


def _example(record: Record) -> Labelled:
    text, number = record.text("Unit").strip(), record.label("B4")
    if number not in ROLES:
        raise DatasetError(f"{record.where}: 'B4' is 0 (persuader) or 1 (persuadee), not {number}.")
    if not text:
        raise Unusable("the sentence is empty")
    if STRATEGY not in record.values:
        return Labelled(text, ROLES[number])
    strategy = record.text(STRATEGY).strip()
    if ROLES[number] == "persuadee" or not strategy:
        raise Unusable("it has no strategy of the persuader")
    return Labelled(text, strategy)
