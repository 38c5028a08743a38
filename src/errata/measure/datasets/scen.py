"""What SCEN (Yao et al. 2024) measures locality on: true sentences and web text, by perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.measure.datasets.records import Record, collect, load
from errata.requests import Probe


def read_accurate(path: Path | str, limit: int | None = None) -> list[Probe]:
    """The first `limit` passages of a file with the true sentence that follows each and must stay.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return collect(load(path), _accurate, source=str(path), limit=limit)


def read_texts(path: Path | str, limit: int | None = None) -> list[str]:
    """The first `limit` texts of a file, whose perplexity must stay.

    Raises:
        DatasetError: the file or a record in it is malformed; the message says where.
    """
    return texts(load(path), source=str(path), limit=limit)


def texts(records: Sequence[Any], *, source: str = "SCEN", limit: int | None = None) -> list[str]:
    """The same for records in memory; `source` names them in messages."""
    return collect(records, lambda record: record.text("text"), source=source, limit=limit)


def _accurate(record: Record) -> Probe:
    return Probe(record.text("text"), record.text("labels"))
