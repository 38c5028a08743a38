"""A row of a study's results: one unit of work and all that came of it, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from errata.errors import ConfigError
from errata.jobs.record import now
from errata.measure.metrics import Estimate

Status = Literal["done", "failed"]


@dataclass(frozen=True)
class Row:
    """What one unit of work gave."""

    key: str
    """Content hash of everything that the unit depends on, and of nothing else."""
    study: str
    """The study that asked for it; not part of the key."""
    unit: Mapping[str, Any]
    """The unit's fields: model, label, method, settings, data, ..."""
    status: Status = "done"
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    cases: tuple[Mapping[str, Any], ...] = ()
    """One for each case, with `case_id` and `metrics`."""
    points: tuple[Mapping[str, Any], ...] = ()
    """A stream's scores on its way, in order: `metrics`, each (mean, low, high, n), and more."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """How it was computed: versions, machine, seconds of each stage."""
    error: str = ""
    """Why it failed."""
    seconds: float = 0.0
    created: str = field(default_factory=now)
    """When it ended: UTC, ISO 8601."""


def order(row: Row) -> tuple[Any, ...]:
    """What rows are sorted by: study, then the unit's fields in their order, numbers as numbers.

    It does not depend on when a row was computed, so that an interrupted study tells its results
    in the order of an uninterrupted one.
    """
    return row.study, [(name, *_rank(value)) for name, value in flat(row.unit).items()], row.key


def _rank(value: Any) -> tuple[int, Any]:
    """Values of different types can stand beside each other: null, numbers, texts, the rest."""
    if value is None:
        return 0, 0
    if isinstance(value, int | float):
        return 1, value
    return (2, value) if isinstance(value, str) else (3, to_json(value))


def chosen(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """The rows whose unit has these values, by field; nested fields by dotted names.

    Raises:
        ConfigError: no unit has a field of that name.
    """
    wanted = json.loads(to_json(where))  # tuples are lists in a unit that was read back
    fields_of = [flat(row.unit) for row in rows]
    known = dict.fromkeys(name for fields in fields_of for name in fields)
    if rows and (unknown := sorted(wanted.keys() - known.keys())):
        raise ConfigError(f"no unit has the fields {unknown}; there are {list(known)}.")
    return [
        row
        for row, fields in zip(rows, fields_of, strict=True)
        if all(name in fields and fields[name] == value for name, value in wanted.items())
    ]


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields under dotted names: `{"a": {"b": 1}}` is `{"a.b": 1}`; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": item for inner, item in flat(value).items()}
        else:
            found[str(name)] = value
    return found


def to_json(value: Any) -> str:
    """As JSON text that `json.loads` gives back to the last bit, NaN and infinities included.

    Tuples become lists, arrays and tensors nested lists.

    Raises:
        TypeError: something in it has no form in JSON.
    """
    return _ENCODER.encode(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # tensors, numpy's numbers and arrays
        return value.tolist()
    raise TypeError(f"a row cannot hold {value!r}: it is no JSON value.")


_ENCODER = json.JSONEncoder(default=_plain, separators=(",", ":"))
