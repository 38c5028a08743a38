"""Published data sets: rows become Cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from errata.errors import DatasetError
from errata.measure.datasets import counterfact, zsre
from errata.measure.datasets.records import load
from errata.requests import Case

FORMATS: dict[str, Callable[..., list[Case]]] = {
    "requested_rewrite": counterfact.cases,
    "locality_prompt": counterfact.cases,
    "src": zsre.cases,
}
"""The key that tells a data set's records -> who reads them."""


def read(path: Path | str, limit: int | None = None) -> list[Case]:
    """The cases of a file in any known format; its first record tells which.

    Raises:
        DatasetError: the format is not known, or a record is malformed.
    """
    records = load(path)
    first = records[0] if isinstance(records[0], dict) else {}
    for key, cases in FORMATS.items():
        if key in first:
            return cases(records, source=str(path), limit=limit)
    raise DatasetError(
        f"{path}: record 1 is of no known data set; its keys are {sorted(first)}. Known are "
        "CounterFact ('requested_rewrite'; 'locality_prompt' in the compact form) and zsRE ('src')."
    )
