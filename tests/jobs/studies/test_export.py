"""Results as files for other programs: whole, in one order, and every number as it was."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ConfigError, StorageError
from errata.jobs.studies.export import LINES, Table
from errata.jobs.studies.store import Store
from errata.measure.metrics import Estimate
from tests.jobs.storing import key_of, row_of

ABOUT = ["key", "study"] + [
    f"unit.{name}"
    for name in ("model", "label", "settings.layers", "settings.target.clamp", "data", "batch")
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Three units: one with numbers that are not finite, one that failed."""
    with Store(tmp_path / "study.sqlite") as store:
        odd = {"ES": Estimate(0.1 + 0.2, math.nan, math.inf, 1), "PS": Estimate(1, 1, 1, 1)}
        store.put(replace(row_of(2, cases=2), metrics=odd))
        store.put(row_of(0, cases=3))
        case = {"case_id": 7, "metrics": {"ES": math.nan, "extra": 1}, "texts": ["a"], "ok": True}
        store.put(
            replace(row_of(4), status="failed", error='no, "memory"\n', cases=(case,), metrics={})
        )
        yield store


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_line_for_each_unit(store: Store, tmp_path: Path) -> None:
    lines = read_csv(store.export(tmp_path / "new" / "units.csv"))
    metrics = [f"{name}.{part}" for name in ("ES", "PS") for part in ("mean", "low", "high", "n")]
    assert list(lines[0]) == [*ABOUT, "status", "seconds", "created", "error", *metrics]
    assert [line["unit.batch"] for line in lines] == ["0", "2", "4"]
    first, odd, failed = lines
    assert float(first["ES.mean"]) == row_of(0, cases=3).metrics["ES"].mean
    assert first["unit.settings.layers"] == "[0,1]" and first["PS.mean"] == ""
    assert float(odd["ES.mean"]) == 0.1 + 0.2
    assert (odd["ES.low"], odd["ES.high"]) == ("nan", "inf")
    assert failed["error"] == 'no, "memory"\n' and failed["ES.mean"] == ""


def test_csv_has_a_line_for_each_case(store: Store, tmp_path: Path) -> None:
    lines = read_csv(store.export(tmp_path / "cases.csv", table="cases"))
    assert list(lines[0]) == [*ABOUT, "case_id", "ES", "extra", "case.texts", "case.ok"]
    assert [line["case_id"] for line in lines] == ["0", "1", "2", "0", "1", "7"]
    wanted = [case["metrics"]["ES"] for case in row_of(0, cases=3).cases]
    assert [float(line["ES"]) for line in lines[:3]] == wanted
    assert (lines[5]["ES"], lines[5]["case.texts"]) == ("nan", '["a"]')


def test_csv_has_a_line_for_each_point(store: Store, tmp_path: Path) -> None:
    lines = read_csv(store.export(tmp_path / "points.csv", table="points"))
    metrics = [f"ES.{part}" for part in ("mean", "low", "high", "n")]
    assert list(lines[0]) == [*ABOUT, "point.edits", *metrics]
    told = [(line["unit.batch"], line["point.edits"], line["ES.n"]) for line in lines[:3]]
    assert told == [("0", "8", "8"), ("0", "16", "8"), ("2", "8", "8")]
    assert float(lines[0]["ES.mean"]) == row_of(0).cases[0]["metrics"]["ES"]


@pytest.mark.parametrize("table", list(LINES))
def test_parquet_holds_what_csv_holds(store: Store, tmp_path: Path, table: Table) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = read_csv(store.export(tmp_path / "a.csv", table=table))
    lines = parquet.read_table(store.export(tmp_path / "a.parquet", table=table)).to_pylist()
    assert [{name: as_text(v) for name, v in line.items()} for line in lines] == texts
    numbers = {name for line in lines for name, v in line.items() if isinstance(v, float | int)}
    assert {"unit.batch", "unit.settings.target.clamp"} <= numbers


def as_text(value: Any) -> str:
    return "" if value is None else str(value)


def test_a_column_of_numbers_and_texts_is_text(store: Store, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    store.put(replace(row_of(6), unit={**row_of(6).unit, "batch": "all"}))
    lines = parquet.read_table(store.export(tmp_path / "a.parquet")).to_pylist()
    assert [line["unit.batch"] for line in lines] == ["0", "2", "4", "all"]


def test_json_lines_hold_whole_rows_in_strict_json(store: Store, tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = store.export(tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [row["key"] for row in rows] == [key_of(0), key_of(2), key_of(4)]
    whole = row_of(0, cases=3)
    assert rows[0] == {
        **vars(whole),
        "metrics": {"ES": whole.metrics["ES"]._asdict()},
        "cases": list(whole.cases),
        "points": list(whole.points),
    }
    assert rows[1]["metrics"]["ES"] == {"mean": 0.1 + 0.2, "low": None, "high": None, "n": 1}


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name, numbers in {"a": (1, 2, 3), "b": (3, 1, 2)}.items():
        with Store(tmp_path / f"{name}.sqlite") as store:
            for number in numbers:
                store.put(row_of(number))
            found.append(store.export(tmp_path / f"{name}.jsonl").read_bytes())
    assert found[0] == found[1]


def test_nothing_to_tell_is_an_empty_table(tmp_path: Path) -> None:
    with Store(tmp_path / "empty.sqlite") as store:
        for suffix in ("csv", "jsonl", "parquet"):
            assert store.export(tmp_path / f"empty.{suffix}").exists()


def test_another_suffix_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot export to a.xlsx: name a .jsonl, .csv or"):
        store.export(tmp_path / "a.xlsx")


def test_without_pyarrow_its_extra_is_named(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'errata\[parquet\]', or export to .csv"):
        store.export(tmp_path / "a.parquet")
    assert not list(tmp_path.glob("*.parquet*"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.csv"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("errata.edits.archive.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        store.export(file)
    assert file.read_text() == "old" and not list(tmp_path.glob(".a.csv*"))
