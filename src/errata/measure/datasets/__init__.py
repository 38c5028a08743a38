"""Published data sets: rows become Cases, or texts with labels.

::

    cases = read("counterfact.json")              # what a model should say, and how to check it
    examples = read_labelled("paper_dev.jsonl")   # what a classifier learns from
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from errata.errors import DatasetError
from errata.measure.datasets import (
    counterfact,
    dialoguenli,
    empathetic,
    fever,
    multinli,
    persuasion,
    wikibio,
    wikitext,
    zsre,
)
from errata.measure.datasets.labelled import Labelled
from errata.measure.datasets.records import Record, load
from errata.requests import Case

T = TypeVar("T")


@dataclass(frozen=True)
class Format(Generic[T]):
    """How a data set's records are told from others, and who reads them."""

    name: str
    keys: frozenset[str]
    """What every record has."""
    read: Callable[..., list[T]]
    lacks: frozenset[str] = frozenset()
    """What no record has."""


CASES: tuple[Format[Case], ...] = (
    Format("CounterFact", frozenset({"requested_rewrite"}), counterfact.cases),
    Format("CounterFact", frozenset({"locality_prompt", "ground_truth"}), counterfact.cases),
    Format("WikiBio", frozenset({"locality_prompt", "target_new"}), wikibio.cases),
    Format("zsRE", frozenset({"src"}), zsre.cases),
    # De Cao et al.'s FEVER has the same keys, and how sure the model was.
    Format("zsRE", frozenset({"input", "alternatives"}), zsre.cases, frozenset({"logit"})),
)
"""Whose records become cases; the first that fits reads them."""

LABELLED: tuple[Format[Labelled], ...] = (
    Format("FEVER", frozenset({"claim", "label"}), fever.examples),
    Format("FEVER", frozenset({"input", "output"}), fever.examples),
    Format("MultiNLI", frozenset({"sentence1", "sentence2", "gold_label"}), multinli.examples),
    Format("MultiNLI", frozenset({"premise", "hypothesis", "label"}), multinli.examples),
    Format("DialogueNLI", frozenset({"sentence1", "sentence2", "label"}), dialoguenli.examples),
    Format("EmpatheticDialogues", frozenset({"conv_id", "prompt"}), empathetic.examples),
    Format("PersuasionForGood", frozenset({"Unit", "B4"}), persuasion.examples),
)
"""Whose records become texts with labels."""


def read(source: Path | str, limit: int | None = None) -> list[Case]:
    """The cases of a file in any known format, or of the Hub; its first record tells which.

    Raises:
        DatasetError: the format is not known, or a record is malformed.
    """
    if Path(source).suffix == ".txt":
        return wikitext.read(source, limit)
    records = load(source)
    if (known := _format(CASES, records)) is not None:
        return known.read(records, source=str(source), limit=limit)
    if (other := _format(LABELLED, records)) is not None:
        raise DatasetError(
            f"{source} is {other.name}: texts with labels, not edits. Make edits of a classifier's "
            f"mistakes: errata make-edits {source} -m ENCODER -o FOLDER"
        )
    raise _unknown(source, records, CASES)


def read_labelled(source: Path | str, limit: int | None = None) -> tuple[str, list[Labelled]]:
    """A data set's name and the examples of a file in any known format, or of the Hub.

    Raises:
        DatasetError: the format is not known, or a record is malformed.
    """
    records = load(source)
    if (known := _format(LABELLED, records)) is None:
        raise _unknown(source, records, LABELLED)
    return known.name, known.read(records, source=str(source), limit=limit)


def is_published(records: Sequence[Any]) -> bool:
    """Whether the first record is of a known data set."""
    return bool(records) and any((_format(CASES, records), _format(LABELLED, records)))


def _format(formats: Sequence[Format[T]], records: Sequence[Any]) -> Format[T] | None:
    keys = _keys(records[0])
    return next((one for one in formats if one.keys <= keys and not one.lacks & keys), None)


def _keys(record: Any) -> set[str]:
    values = record.values if isinstance(record, Record) else record
    return set(values) if isinstance(values, dict) else set()


def _unknown(
    source: Path | str, records: Sequence[Any], formats: Sequence[Format[T]]
) -> DatasetError:
    known = "; ".join(f"{one.name} ({', '.join(sorted(one.keys))})" for one in formats)
    return DatasetError(
        f"{source}: record 1 is of no known data set; its keys are {sorted(_keys(records[0]))}. "
        f"Known are, by their keys: {known}."
    )
