"""Studies and streams in processes that are killed (kill -9): the rows are those of one run."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.errors import StorageError
from errata.jobs import score as judging
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.findings import gather
from errata.jobs.studies.markdown import markdown
from errata.jobs.studies.results import read_results
from errata.jobs.studies.rows import Row
from errata.jobs.studies.run import run
from errata.jobs.studies.store import Store
from tests.jobs.killing import begin
from tests.jobs.working import experiment

STREAM = """
[protocol]
kind = "sequential"
every = 2
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums are then added up in the same order as in the children, to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(folder: Path) -> list[Row]:
    with Store(folder / "mine.sqlite", read_only=True) as store:
        return store.rows(cases=True)


def told(row: Row) -> Mapping[str, Any]:
    """All of a row that must not depend on when and how often it was begun."""
    names = ("config", "cases", "failed", "stopped", "failures", "seeds", "edits")
    return {
        "unit": row.unit,
        "status": row.status,
        "metrics": row.metrics,
        "cases": row.cases,
        "points": row.points,
        "record": {name: row.record.get(name) for name in names},
    }


def report(file: Path, folder: Path) -> str:
    """The report as Markdown, but for the section on machines and times."""
    found = markdown(gather(read_results(str(file), folder)), [])
    text, _, _ = found.partition("## Machines and times")
    return text


def progress(folder: Path) -> tuple[int, int]:
    """Batches of streams that are written down, and rows."""
    kept = 0
    with suppress(StorageError):  # the database is not whole before its tables are in it
        kept = len(rows(folder))
    return len(list(folder.glob("mine.streams/*/batch-*.json"))), kept


def kill_again_and_again(file: Path, folder: Path, cache: Path, kills: int, seed: int) -> int:
    """How many kills met a running process: every other soon after something was written down.

    The others come soon after the start. After each the database has all rows that it had.
    """
    rng = random.Random(seed)
    met = 0
    for number in range(kills):
        there = progress(folder)
        process = begin(file, folder, cache)
        while number % 2 and process.is_alive() and progress(folder) == there:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.3))
        met += process.is_alive()
        process.kill()
        process.join()
        now = progress(folder)
        assert now[0] >= there[0] and now[1] >= there[1]
    last = begin(file, folder, cache)
    last.join()
    assert last.exitcode == 0
    return met


def compared(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, kills: int, *more: str
) -> int:
    file = experiment(folder, trained, *more)
    met = kill_again_and_again(file, folder / "killed", folder / "cache", kills, seed=kills)
    monkeypatch.setenv("ERRATA_CACHE", str(folder / "another"))  # where nothing is known
    monkeypatch.setattr(judging, "NEUTRAL", 4)
    run(Experiment.load(file), folder=folder / "whole")
    killed, whole = rows(folder / "killed"), rows(folder / "whole")
    assert [row.key for row in killed] == [row.key for row in whole]
    assert list(map(told, killed)) == list(map(told, whole))
    assert report(file, folder / "killed") == report(file, folder / "whole")
    return met


@pytest.mark.timeout(900)
def test_killed_four_times(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compared(tmp_path, trained_folder, monkeypatch, 4, STREAM) >= 3


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("protocol", "count"), [(STREAM, 20), ("", 40)], ids=["stream", "study"])
def test_killed_a_hundred_times(
    protocol: str,
    count: int,
    tmp_path: Path,
    trained_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = f"seeds = {list(range(count))}\n"  # more work than so many processes finish
    assert compared(tmp_path, trained_folder, monkeypatch, 100, seeds + protocol) >= 75


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_processes_share_a_study(tmp_path: Path, trained_folder: Path) -> None:
    file = experiment(tmp_path, trained_folder, "seeds = [0, 1, 2, 3, 4, 5]")
    processes = [begin(file, tmp_path / "shared", tmp_path / "cache") for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = rows(tmp_path / "shared")
    assert len(found) == 12 and {row.status for row in found} == {"done"}
