"""Reading published records: a file becomes dictionaries, each field checked by name and type."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from errata.errors import DatasetError, RequestError, RequestFileError
from errata.measure.datasets import hub
from errata.requests import Request, read_jsonl

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Unusable(Exception):
    """A well-formed record that cannot be used; it is counted and passed over."""


def load(source: Path | str) -> list[Any]:
    """The records of a file: a JSON list, JSON lines (`.jsonl`) or a table (`.csv`); or of the Hub.

    What stands on a line comes as a `Record` that knows its line; the rest as it is in the file.

    Args:
        source: a path, or `hub:name[:config][:split]` for a data set of the Hugging Face Hub.

    Raises:
        DatasetError: the file cannot be read, is not whole, or holds no records.
    """
    if str(source).startswith(hub.PREFIX):
        return hub.rows(str(source))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    if path.suffix == ".csv":
        return _table(path, text)
    # DialogueNLI's files are called JSON lines, but hold one list.
    if path.suffix == ".jsonl" and not text.lstrip().startswith("["):
        return _lines(path)
    return _list(path, text)


def _list(path: Path, text: str) -> list[Any]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            "The file must hold one complete JSON list of records; it may have been cut short."
        ) from error
    if not isinstance(records, list) or not records:
        what = "an empty list" if records == [] else type(records).__name__
        raise DatasetError(f"{path} must hold a JSON list of records, got {what}.")
    return records


def _lines(path: Path) -> list[Record]:
    try:
        lines = read_jsonl(path)
    except RequestFileError as error:
        raise DatasetError(str(error)) from error
    if not lines:
        raise DatasetError(f"{path} holds no record.")
    return [Record(values, f"{path}, line {number}") for number, values in lines]


def _table(path: Path, text: str) -> list[Record]:
    table = csv.reader(text.splitlines(keepends=True))
    try:
        names = next(table, [])
        records = []
        for row in table:
            where = f"{path}, line {table.line_num}"
            if len(row) != len(names):
                raise DatasetError(f"{where} has {len(row)} fields; its head has {len(names)}.")
            records.append(Record(dict(zip(names, row, strict=True)), where))
    except csv.Error as error:
        raise DatasetError(f"{path}, line {table.line_num}: not a table ({error}).") from error
    if not records:
        raise DatasetError(f"{path} holds no record.")
    return records


@dataclass(frozen=True)
class Record:
    """One record with its whereabouts, so that every complaint can name them."""

    values: Mapping[str, Any]
    where: str

    def text(self, key: str) -> str:
        """A text that must be there."""
        return self._typed(self._present(key), str, key)

    def label(self, key: str) -> str:
        """A label that must be there, a name or a number."""
        value = self._present(key)
        return str(value) if isinstance(value, int) else self._typed(value, str, key)

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
    records: Sequence[Any], convert: Callable[[Record], T], *, source: str, limit: int | None
) -> list[T]:
    """Convert records until there are `limit` cases; unusable ones are counted in the log.

    Raises:
        DatasetError: a record is malformed (its number is named, the first is 1), or no record
            is usable.
    """
    cases: list[T] = []
    skipped: Counter[str] = Counter()
    for number, values in enumerate(records, 1):
        if len(cases) == limit:
            break
        record = values
        if not isinstance(record, Record):
            where = f"{source}, record {number}"
            if not isinstance(values, dict):
                raise DatasetError(f"{where} must be an object, got {type(values).__name__}.")
            record = Record(values, where)
        try:
            cases.append(convert(record))
        except Unusable as why:
            skipped[str(why)] += 1
        except RequestError as error:
            raise DatasetError(f"{record.where}: {error}") from error
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
