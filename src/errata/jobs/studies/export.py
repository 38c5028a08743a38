"""Results as files for other programs: JSON lines, CSV, Parquet.

JSON lines hold whole rows. CSV and Parquet hold one of three wide tables, whose columns begin with
`key`, `study` and the unit's fields as `unit.model`, `unit.settings.layers`, ...:

- *units*: a line for each unit, with `status`, `seconds`, `created`, `error` and, for each metric,
  `ES.mean`, `ES.low`, `ES.high`, `ES.n`;
- *cases*: a line for each case of each unit, with `case_id`, metrics under their own names, and
  whatever else a case holds under `case.`;
- *points*: a line for each point of each stream, with its metrics as those of a unit, and whatever
  else it tells under `point.`.

What a line does not have is empty (null); NaN and infinity are kept as such, except that JSON has
neither: they are null there. Lists are JSON text in tables.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from errata.edits.archive import write_whole
from errata.edits.edit import as_json
from errata.errors import ConfigError
from errata.jobs.files import make_folder
from errata.jobs.studies.rows import Row, flat, to_json
from errata.measure.metrics import Estimate

Table = Literal["units", "cases", "points"]

Line = dict[str, Any]
"""Of a table: column -> value; what is not there is empty."""


def export_rows(rows: Sequence[Row], path: Path | str, *, table: Table = "units") -> Path:
    """Write rows to a file, whole or not at all.

    Args:
        rows: in the order of the file, with their cases.
        path: its suffix says what it will be: .jsonl, .csv or .parquet.
        table: which table, of a CSV or Parquet file.

    Raises:
        ConfigError: the suffix is none of these, or a library is missing.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        data = "".join(_json_line(row) for row in rows).encode("utf-8", "backslashreplace")
    elif path.suffix in _TABLES:
        data = _TABLES[path.suffix](_columns(LINES[table](rows)))
    else:
        raise ConfigError(f"cannot export to {path.name}: name a .jsonl, .csv or .parquet file.")
    make_folder(path.parent)
    write_whole(path, data)
    return path


def _json_line(row: Row) -> str:
    values = as_json(row) | {
        "metrics": {name: as_json(estimate._asdict()) for name, estimate in row.metrics.items()}
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def unit_lines(rows: Sequence[Row]) -> list[Line]:
    """A line for each unit."""
    return [
        _about(row)
        | {"status": row.status, "seconds": row.seconds, "created": row.created, "error": row.error}
        | _estimates(row.metrics)
        for row in rows
    ]


def case_lines(rows: Sequence[Row]) -> list[Line]:
    """A line for each case of each unit."""
    return [
        _about(row)
        | {"case_id": case.get("case_id")}
        | dict(case.get("metrics", {}))
        | _others(case, "case", known=("case_id", "metrics"))
        for row in rows
        for case in row.cases
    ]


def point_lines(rows: Sequence[Row]) -> list[Line]:
    """A line for each point of each stream."""
    return [
        _about(row)
        | _others(point, "point", known=("metrics",))
        | _estimates(point.get("metrics", {}))
        for row in rows
        for point in row.points
    ]


LINES: dict[Table, Callable[[Sequence[Row]], list[Line]]] = {
    "units": unit_lines,
    "cases": case_lines,
    "points": point_lines,
}
"""Name of a table -> its lines."""


def _about(row: Row) -> Line:
    return {"key": row.key, "study": row.study} | _others(row.unit, "unit")


def _others(values: Mapping[str, Any], group: str, known: Collection[str] = ()) -> Line:
    rest = {name: value for name, value in values.items() if name not in known}
    return {f"{group}.{name}": value for name, value in flat(rest).items()}


def _estimates(metrics: Mapping[str, Sequence[float | None]]) -> Line:
    return {
        f"{name}.{part}": value
        for name, estimate in metrics.items()
        for part, value in zip(Estimate._fields, estimate, strict=True)
    }


def _columns(lines: Sequence[Line]) -> dict[str, list[Any]]:
    """Lines as columns of one length, in the order in which they first appear."""
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [_cell(line.get(name)) for line in lines] for name in names}


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else to_json(value)


def _csv(columns: Mapping[str, list[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode("utf-8", "backslashreplace")


def _parquet(columns: Mapping[str, list[Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet files need pyarrow: pip install 'errata[parquet]', or export to .csv."
        ) from error
    table = pyarrow.table({name: _of_one_type(values) for name, values in columns.items()})
    data = io.BytesIO()
    pyarrow.parquet.write_table(table, data)
    return data.getvalue()


def _of_one_type(values: list[Any]) -> list[Any]:
    """A column whose values are all numbers, all yes or no, or else all text."""
    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) <= 1:
        return values
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    return [None if value is None else str(value) for value in values]


_TABLES: dict[str, Callable[[Mapping[str, list[Any]]], bytes]] = {
    ".csv": _csv,
    ".parquet": _parquet,
}
