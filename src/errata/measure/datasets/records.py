"""Reading published records: a file becomes dictionaries, each field checked by name and type."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from errata.errors import DatasetError, RequestError
from errata.requests import Case, Request

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Unusable(Exception):
    """A well-formed record that cannot become a case; it is counted and passed over."""


def load(path: Path | str) -> list[Any]:
    """The records of a JSON file that holds one list.

    Raises:
        DatasetError: the file cannot be read, is not whole JSON, or holds no list of records.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            "The file must hold one complete JSON list of records; it may have been cut short."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    if not isinstance(records, list) or not records:
        what = "an empty list" if records == [] else type(records).__name__
        raise DatasetError(f"{path} must hold a JSON list of records, got {what}.")
    return records


@dataclass(frozen=True)
class Record:
    """One record with its whereabouts, so that every complaint can name them."""

    values: Mapping[str, Any]
    where: str

    def text(self, key: str) -> str:
        """A text that must be there."""
        return self._typed(self._present(key), str, key)

    def inner(self, key: str) -> Record:
        """A nested record that must be there."""
        return Record(self._typed(self._present(key), dict, key), f"{self.where}, {key!r}")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; none where the key is absent."""
        return tuple(self._typed(item, str, f"{key}[{i}]") for i, item in self._items(key))

    def inners(self, key: str) -> list[Record]:
        """A list of nested records; none where the key is absent."""
        return [
            Record(self._typed(item, dict, f"{key}[{i}]"), f"{self.where}, '{key}[{i}]'")
            for i, item in self._items(key)
        ]

    def _items(self, key: str) -> list[tuple[int, Any]]:
        return list(enumerate(self._typed(self.values.get(key, []), list, key)))

    def _present(self, key: str) -> Any:
        if key not in self.values:
            raise DatasetError(f"{self.where} has no {key!r}; it has {sorted(self.values)}.")
        return self.values[key]

    def _typed(self, value: Any, kind: type[T], key: str) -> T:
        if not isinstance(value, kind):
            raise DatasetError(
                f"{self.where}: {key!r} must be {_NAMES[kind]}, got {type(value).__name__}."
            )
        return value


_NAMES: dict[type, str] = {str: "text", dict: "an object", list: "a list"}


def collect(
    records: Sequence[Any], convert: Callable[[Record], Case], *, source: str, limit: int | None
) -> list[Case]:
    """Convert records until there are `limit` cases; unusable ones are counted in the log.

    Raises:
        DatasetError: a record is malformed (its number is named, the first is 1), or no record
            is usable.
    """
    cases: list[Case] = []
    skipped: Counter[str] = Counter()
    for number, values in enumerate(records, 1):
        if len(cases) == limit:
            break
        where = f"{source}, record {number}"
        if not isinstance(values, dict):
            raise DatasetError(f"{where} must be an object, got {type(values).__name__}.")
        try:
            cases.append(convert(Record(values, where)))
        except Unusable as why:
            skipped[str(why)] += 1
        except RequestError as error:
            raise DatasetError(f"{where}: {error}") from error
    reasons = "; ".join(f"{count} because {why}" for why, count in skipped.items())
    if skipped and not cases:
        raise DatasetError(f"{source}: no record is usable: {reasons}.")
    if skipped:
        read = len(cases) + skipped.total()
        logger.warning("%s: skipped %d of %d: %s.", source, skipped.total(), read, reasons)
    return cases


def sentence(prompt: str, subject: str, target: str, true: str | None) -> Request:
    """A request from a complete sentence that names its subject.

    Raises:
        Unusable: the target is empty, or the subject is not in the prompt exactly once.
    """
    if not target.strip():
        raise Unusable("the new target is empty")
    if not subject or subject not in prompt:
        raise Unusable("the subject is not in the prompt")
    if prompt.count(subject) > 1:
        raise Unusable("the subject is in the prompt more than once")
    return Request(prompt.replace(subject, "{}"), subject, target, true)
