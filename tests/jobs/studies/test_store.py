"""Rows are kept once and given back as they were; refusals say what is safe and what to do."""

from __future__ import annotations

import math
import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from errata.errors import ConfigError, StorageError
from errata.jobs.studies import database
from errata.jobs.studies.store import Row, Store
from errata.measure.metrics import Estimate
from tests.jobs.storing import key_of, row_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "study.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as store:
        yield store


# What goes in comes out.


def test_a_row_is_read_back_as_it_was_put(store: Store, path: Path) -> None:
    assert store.put(row_of(1))
    assert store.get(key_of(1)) == row_of(1)
    assert store.cases(key_of(1)) == row_of(1).cases
    store.close()
    with Store(path, read_only=True) as again:
        assert again.rows(cases=True) == [row_of(1)]


def test_what_is_not_there_is_none(store: Store) -> None:
    assert store.get(key_of(1)) is None
    assert store.cases(key_of(1)) == ()
    assert store.rows() == [] and store.statuses() == {} and store.claims() == {}


def test_nan_infinity_none_and_every_bit_survive(store: Store) -> None:
    metrics = {
        "unknown interval": Estimate(0.1 + 0.2, math.nan, math.nan, 1),
        "infinite": Estimate(math.inf, -math.inf, math.inf, 2),
    }
    values = {"nan": math.nan, "none": None, "tiny": 5e-324, "minus": -0.0, "big": 2**70}
    store.put(replace(row_of(1), metrics=metrics, cases=({"case_id": 0, "metrics": values},)))
    found = store.get(key_of(1))
    assert found is not None
    assert found.metrics["unknown interval"].mean == 0.1 + 0.2
    assert math.isnan(found.metrics["unknown interval"].low)
    assert found.metrics["infinite"] == metrics["infinite"]
    (case,) = found.cases
    assert math.isnan(case["metrics"].pop("nan"))
    assert repr(case["metrics"]) == repr({k: v for k, v in values.items() if k != "nan"})


def test_arrays_and_odd_texts_are_kept(store: Store) -> None:
    about = {
        "array": np.array([0.5, 1], dtype="float32"),
        "tensor": torch.tensor(3),
        "text": "\ud800 ü \0 '",
    }
    store.put(replace(row_of(1), record=about, error="\udcff"))
    found = store.get(key_of(1))
    assert found is not None
    assert found.record == {"array": [0.5, 1.0], "tensor": 3, "text": "\ud800 ü \0 '"}
    assert found.error == "\\udcff"


def test_what_json_cannot_hold_leaves_nothing_behind(store: Store) -> None:
    store.claim(key_of(1))
    with pytest.raises(TypeError, match="no JSON value"):
        store.put(replace(row_of(1), points=({"edits": 1}, {"edits": object()})))
    assert store.get(key_of(1)) is None and key_of(1) in store.claims()
    assert store.put(row_of(1))


# One row for each key.


def test_the_first_finished_row_stands(store: Store) -> None:
    assert store.put(row_of(1))
    assert not store.put(replace(row_of(1), seconds=9.0, cases=()))
    assert not store.put(replace(row_of(1), status="failed", error="late"))
    assert store.rows(cases=True) == [row_of(1)]


def test_a_failed_row_gives_way(store: Store) -> None:
    failed = replace(row_of(1), status="failed", error="out of memory", metrics={})
    assert store.put(failed) and store.put(replace(failed, error="again"))
    assert [row.error for row in store.rows()] == ["again"]
    assert store.claim(key_of(1))
    assert store.put(row_of(1))
    assert store.rows(cases=True) == [row_of(1)]
    rows = store._db.execute("SELECT count(*) FROM cases").fetchone()
    assert rows == (len(row_of(1).cases),), "cases of the failed row are left behind"


def test_names_are_no_part_of_a_key(store: Store) -> None:
    store.put(row_of(1))
    unit = {**row_of(1).unit, "label": "MEMIT as published"}
    store.rename(key_of(1), "another", unit)
    assert store.get(key_of(1)) == replace(row_of(1), study="another", unit=unit)
    store.rename(key_of(2), "another", unit)
    assert list(store.statuses()) == [key_of(1)]


# Reading.


def test_order_does_not_depend_on_when_rows_were_put(tmp_path: Path) -> None:
    found = []
    for seed in range(3):
        numbers = list(range(0, 132, 11))
        random.Random(seed).shuffle(numbers)
        with Store(tmp_path / f"{seed}.sqlite") as store:
            for number in numbers:
                store.put(row_of(number))
            found.append(store.rows(cases=True))
    assert found[0] == found[1] == found[2]
    batches = [row.unit["batch"] for row in found[0]]
    even, odd = [0, 22, 44, 66, 88, 110], [11, 33, 55, 77, 99, 121]
    assert batches == even + odd, "by model, numbers as numbers"


def test_units_of_different_kinds_can_be_sorted(store: Store) -> None:
    for key, value in {"a": None, "b": 3, "c": "x", "d": [1], "e": {"f": 1}, "g": 2.5}.items():
        store.put(Row(key=key, study="s", unit={"value": value}))
    assert [row.key for row in store.rows()] == ["a", "g", "b", "c", "d", "e"]


def test_rows_are_chosen_by_their_units_fields(store: Store) -> None:
    for number in range(4):
        store.put(row_of(number))
    store.put(replace(row_of(4), status="failed"))
    store.put(replace(row_of(5), study="other"))

    def batches(**asked: object) -> list[int]:
        return [row.unit["batch"] for row in store.rows(**asked)]  # type: ignore[arg-type]

    assert batches(where={"model": "pocket-llama"}, study="s") == [1, 3]
    assert batches(where={"settings.target.clamp": 0.25}) == [2]
    assert batches(where={"model": "pocket", "settings.layers": (0, 1)}) == [0, 2, 4]
    assert batches(where={"model": "none"}) == []
    assert batches(status="failed") == [4]
    assert batches(study="other") == [5]
    assert batches(keys={key_of(3), key_of(9)}) == [3]
    with pytest.raises(ConfigError, match=r"no unit has the fields \['modell'\]; there are.*model"):
        store.rows(where={"modell": "pocket"})


def test_cases_are_read_when_asked_for(store: Store) -> None:
    store.put(row_of(1))
    assert store.rows() == [replace(row_of(1), cases=())]


# Refused.


@pytest.mark.parametrize("read_only", [False, True])
def test_another_version_is_refused(path: Path, read_only: bool) -> None:
    with Store(path) as store:
        store._db.execute("PRAGMA user_version = 7")
    with pytest.raises(StorageError, match="version 7 .* reads version 1: use the errata that"):
        Store(path, read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("content", [b"key,ES\n1,0.5\n" * 100, b"x" * 50, os.urandom(9000)])
def test_a_file_that_is_no_database_is_refused_and_left_alone(
    tmp_path: Path, content: bytes, read_only: bool
) -> None:
    file = tmp_path / "results.csv"
    file.write_bytes(content)
    with pytest.raises(StorageError, match="not a database. It is another kind of file; name"):
        Store(file, read_only=read_only)
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.glob("results*")] == ["results.csv"]


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "bookmarks.sqlite"
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE bookmarks (address)")
    before = file.read_bytes()
    with pytest.raises(StorageError, match="database of another program; name another place"):
        Store(file)
    assert file.read_bytes() == before


def test_a_damaged_database_is_told(path: Path) -> None:
    with Store(path) as store:
        for number in range(20):
            store.put(row_of(number))
    content = bytearray(path.read_bytes())
    content[4096:40960] = b"\xff" * 36864
    path.write_bytes(content)
    with (
        pytest.raises(StorageError, match="malformed.*Move it away and run the study again"),
        Store(path, read_only=True) as store,
    ):
        store.rows(cases=True)


def test_a_full_disk_says_what_is_safe(path: Path) -> None:
    with Store(path) as store:
        for number in range(5):
            store.put(row_of(number))
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to have no room
        claimed = store.claim(key_of(5))
        with pytest.raises(StorageError) as caught:
            store.put(row_of(5, cases=500))
        told = str(caught.value)
        assert claimed and f"result of unit {key_of(5)[:12]} is not kept" in told
        assert "full" in told and "finished before is safe" in told and "Free space" in told
        assert store.get(key_of(5)) is None
        store._db.execute("PRAGMA max_page_count = 1000000")
        assert store.put(row_of(5, cases=500)), "it goes on when there is space again"
        assert len(store.rows()) == 6


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write to")
def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(StorageError, match=r"unable to open.*Give yourself the right to write"):
        Store("/proc/study.sqlite")
    with pytest.raises(StorageError, match="cannot make the folder /proc/results"):
        Store("/proc/results/study.sqlite")


def test_results_are_read_where_nothing_can_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(path) as store:
        store.put(row_of(1))
    connected = database._connected

    def refusing(path: Path, way: str) -> sqlite3.Connection:
        if not way.endswith("immutable=1"):
            raise sqlite3.OperationalError("unable to open database file")
        return connected(path, way)

    monkeypatch.setattr(database, "_connected", refusing)
    with Store(path, read_only=True) as store:
        assert store.rows(cases=True) == [row_of(1)]


def test_a_reader_changes_nothing(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no file .* Run the study first"):
        Store(path, read_only=True)
    assert not path.parent.exists()
    with Store(path) as store:
        store.put(row_of(1))
    before = path.read_bytes()
    with Store(path, read_only=True) as store:
        with pytest.raises(StorageError, match="readonly database"):
            store.put(row_of(2))
        with pytest.raises(StorageError, match="readonly database"):
            store.claim("a")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path], "no log is left beside it"


def test_reading_goes_on_while_another_process_writes(path: Path) -> None:
    with Store(path) as writer, Store(path, read_only=True) as reader:
        writer.put(row_of(1))
        with writer._writing("nothing"):
            writer._insert(row_of(2))
            assert len(reader.rows()) == 1
        assert len(reader.rows()) == 2
