"""Studies and streams in processes that are killed (kill -9): the rows are those of one run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.jobs import score as judging
from errata.jobs.experiment import Experiment
from errata.jobs.rows import Row
from errata.jobs.store import Store
from errata.jobs.studies import run
from tests.jobs.working import experiment

STREAM = """
[protocol]
kind = "sequential"
every = 2
"""

CHILD = """
import sys
import torch
torch.set_num_threads(1)
from errata.jobs import score
score.NEUTRAL = 4
from errata.jobs.experiment import Experiment
from errata.jobs.studies import run
result = run(Experiment.load(sys.argv[1]), folder=sys.argv[2])
assert not result.failed, result.failed
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
    names = ("config", "cases", "failed", "stopped", "failures", "seeds")
    return {
        "unit": row.unit,
        "status": row.status,
        "metrics": row.metrics,
        "cases": row.cases,
        "points": row.points,
        "record": {name: row.record[name] for name in names},
    }


def begin(file: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def batches(folder: Path) -> int:
    return len(list(folder.glob("mine.streams/*/batch-*.json")))


def kill_again_and_again(file: Path, folder: Path, kills: int, seed: int) -> int:
    """Each kill comes soon after another checkpoint was written; how many met a running process."""
    rng = random.Random(seed)
    met = 0
    for _ in range(kills):
        there = batches(folder)
        process = begin(file, folder)
        while process.poll() is None and batches(folder) == there:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.3))
        met += process.poll() is None
        process.kill()
        process.wait()
    assert begin(file, folder).wait() == 0
    return met


def compared(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, kills: int, *more: str
) -> int:
    file = experiment(folder, trained, *more)
    monkeypatch.setenv("ERRATA_CACHE", str(folder / "cache"))
    met = kill_again_and_again(file, folder / "killed", kills, seed=kills)
    monkeypatch.setenv("ERRATA_CACHE", str(folder / "another"))  # where nothing is known
    monkeypatch.setattr(judging, "NEUTRAL", 4)
    run(Experiment.load(file), folder=folder / "whole")
    killed, whole = rows(folder / "killed"), rows(folder / "whole")
    assert [row.key for row in killed] == [row.key for row in whole]
    assert list(map(told, killed)) == list(map(told, whole))
    return met


@pytest.mark.timeout(900)
def test_killed_four_times(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compared(tmp_path, trained_folder, monkeypatch, 4, STREAM) >= 3


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_a_hundred_times(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = f"seeds = {list(range(20))}\n"
    assert compared(tmp_path, trained_folder, monkeypatch, 100, seeds + STREAM) >= 90


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_processes_share_a_study(tmp_path: Path, trained_folder: Path) -> None:
    file = experiment(tmp_path, trained_folder, "seeds = [0, 1, 2, 3, 4, 5]")
    processes = [begin(file, tmp_path / "shared") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    found = rows(tmp_path / "shared")
    assert len(found) == 12 and {row.status for row in found} == {"done"}
