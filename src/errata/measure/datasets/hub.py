"""Rows of a data set of the Hugging Face Hub."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from errata.errors import DatasetError

PREFIX = "hub:"
"""How a source says that it is on the Hub."""


def rows(source: str) -> list[dict[str, Any]]:
    """All rows of `hub:name[:config][:split]` (split "train" where left out).

    The name may also be a local folder of files that the `datasets` package reads.

    Raises:
        DatasetError: there is no such data set, no network, or no `datasets` package.
    """
    parts = source.removeprefix(PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise DatasetError(f"{source!r} is no data set; write hub:name[:config][:split].")
    name, config, split = (*parts, *[""] * (3 - len(parts)))
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise DatasetError(
            f"{source!r} needs the `datasets` package: pip install 'errata[hub]'. Or give a file."
        ) from error
    try:
        found = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"cannot read the data set {source!r}: {error}\n"
            "  Check the name, config and split (hub:name[:config][:split]), and the network."
        ) from error
    return [dict(row) for row in found]
