"""Texts with labels: what a classifier learns from, and what edits of its mistakes are made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from errata.measure.datasets.records import Record, Unusable, collect
from errata.requests import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """A text and its label."""

    text: str
    label: str
    rephrasings: tuple[str, ...] = ()
    """Other ways to say the same, where the data set brings them."""

    def __post_init__(self) -> None:
        """Refuse what no classifier could learn from.

        Raises:
            RequestError: the text or the label is empty.
        """
        self.request(self.label)

    def request(self, target: str, true: str | None = None) -> Request:
        """The wish that the text be given a label. A text without a subject is its own subject."""
        return Request("{}", self.text, target, true)


def pair(premise: str, hypothesis: str) -> str:
    """Two texts, of which one is judged by the other, as one text (T5's wording)."""
    return f"premise: {premise.strip()} hypothesis: {hypothesis.strip()}"


def collect_labelled(
    records: Sequence[Any], convert: Callable[[Record], Labelled], *, source: str, limit: int | None
) -> list[Labelled]:
    """Convert records until there are `limit` examples; a text counts once.

    Raises:
        DatasetError: a record is malformed, or none is usable.
    """
    seen: set[str] = set()

    def once(record: Record) -> Labelled:
        example = convert(record)
        if example.text in seen:
            raise Unusable("the text was there before")
        seen.add(example.text)
        return example

    return collect(records, once, source=source, limit=limit)
