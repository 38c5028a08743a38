"""Several processes at one study, killed or not, and several studies with units in common."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from errata.jobs.studies.siblings import siblings
from errata.jobs.studies.store import Row, Store
from tests.jobs import storing
from tests.jobs.storing import key_of, row_of

T = TypeVar("T")

posix = pytest.mark.skipif(os.name != "posix", reason="Windows cannot fork or kill")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies of other tests are no siblings."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "study.sqlite"


# Claims.


def test_a_unit_is_claimed_once(path: Path) -> None:
    with Store(path) as one, Store(path) as two:
        assert one.claim("a")
        assert not two.claim("a") and not one.claim("a")
        two.release("a")
        assert not two.claim("a"), "another's claim is not released"
        one.release("a")
        assert two.claim("a")
        assert two.claims() == {"a": two.owner}


def test_putting_lets_go_of_the_claim_and_done_is_not_claimed(path: Path) -> None:
    with Store(path) as one, Store(path) as two:
        assert one.claim(key_of(1))
        one.put(row_of(1))
        assert one.claims() == {}
        assert not two.claim(key_of(1))


def test_closing_lets_go_of_all_claims(path: Path) -> None:
    with Store(path) as one:
        one.claim("a")
        one.claim("b")
        one.close()  # and once more at the end of the block
    with Store(path) as two:
        assert two.claims() == {} and two.claim("a")


@posix
def test_a_claim_of_a_killed_process_is_taken_over(path: Path) -> None:
    child = started(storing.hold, str(path), "a")
    with Store(path) as store:
        wait_for(lambda: bool(store.claims()))
        assert not store.claim("a")
        child.kill()
        child.join()
        assert store.claim("a")


def test_a_claim_of_another_host_is_taken_over_when_it_is_silent(path: Path) -> None:
    with Store(path, stale_after=60) as store:
        claim = "INSERT INTO claims VALUES (?, 'elsewhere:1:x', ?)"
        store._db.execute(claim, ("silent", time.time() - 61))
        store._db.execute(claim, ("alive", time.time() - 59))
        assert store.claim("silent") and not store.claim("alive")


def test_a_claim_stays_alive_while_its_unit_is_computed(path: Path) -> None:
    with Store(path, stale_after=0.4) as one, Store(path, stale_after=0.4) as two:
        assert one.claim("a")
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert not two.claim("a")
            time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "claims"]


@posix
def test_two_processes_compute_each_unit_once(path: Path, tmp_path: Path) -> None:
    computed, count = tmp_path / "computed", 50
    told = [tmp_path / "one", tmp_path / "two"]
    together = multiprocessing.get_context("forkserver").Barrier(2)
    workers = [
        started(storing.work, str(path), count, str(file), str(computed), together) for file in told
    ]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    keys = [key_of(number) for number in range(count)]
    assert sorted(computed.read_text().split()) == keys
    stored = [file.read_text().split() for file in told]
    assert sorted(stored[0] + stored[1]) == keys
    assert all(stored), "one of the two did nothing"
    with Store(path) as store:
        assert list(store.statuses()) == keys and store.claims() == {}


# Killed.


def killed_and_continued(path: Path, kills: int, count: int) -> None:
    """Kill a process that stores rows, again and again, then let it finish."""
    file = path.with_name("told")
    draw = random.Random(0)
    for kill in range(kills):
        there = len(lines(file))
        child = started(storing.work, str(path), count, str(file))
        if kill % 3:
            wait_for(lambda there=there: len(lines(file)) > there)  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.02))  # it is storing rows now
        else:
            time.sleep(draw.uniform(0, 0.1))  # it may be opening the database
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it ended by itself; give it more to do"
        with Store(path) as store:
            rows = store.rows(cases=True)
        assert set(lines(file)) <= {row.key for row in rows}, "a finished row is lost"
        assert len({row.key for row in rows}) == len(rows)
        assert all(plain(row) == row_of(int(row.key, 16)) for row in rows), "half a row"
    assert len(set(lines(file))) == len(lines(file)), "a unit was stored twice"
    storing.work(str(path), count, str(file))
    with Store(path) as store:
        continued = [plain(row) for row in store.rows(cases=True)]
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    uninterrupted = path.with_name("uninterrupted.sqlite")
    storing.work(str(uninterrupted), count, str(file))
    with Store(uninterrupted) as store:
        assert [plain(row) for row in store.rows(cases=True)] == continued


def started(do: Callable[..., None], *arguments: object) -> Any:
    """A process that does this; torch is imported only once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["errata.jobs.studies.store"])
    process = context.Process(target=do, args=arguments)
    process.start()
    return process


def wait_for(ready: Callable[[], T]) -> T:
    until = time.monotonic() + 60
    while not (found := ready()):
        assert time.monotonic() < until, "the process does nothing"
        time.sleep(0.001)
    return found


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def plain(row: Row) -> Row:
    """Without what says who computed it."""
    return replace(row, record=row_of(0).record)


class Deadly(tuple[Any, ...]):
    """Cases that kill the process which stores them, on the way."""

    def __iter__(self) -> Iterator[Any]:
        yield from ({"case_id": i} for i in range(1000))
        os.kill(os.getpid(), signal.SIGKILL)


def put_deadly(path: str) -> None:
    with Store(path) as store:
        store.put(row_of(1))
        store.claim(key_of(2))
        store.put(replace(row_of(2), cases=Deadly()))


@posix
def test_killed_in_the_middle_of_a_row_leaves_nothing_of_it(path: Path) -> None:
    child = started(put_deadly, str(path))
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with Store(path) as store:
        assert store.rows(cases=True) == [row_of(1)]
        assert store.claim(key_of(2)) and store.put(row_of(2))
        assert store.get(key_of(2)) == row_of(2)


def test_a_result_waits_for_the_disk_and_a_claim_does_not(path: Path) -> None:
    with Store(path) as store:
        level = "PRAGMA synchronous"
        store.put(row_of(1))
        assert store._db.execute(level).fetchone() == (2,), "FULL: a power cut takes no row"
        store.claim(key_of(2))
        assert store._db.execute(level).fetchone() == (1,), "NORMAL: fast, and no damage"


@posix
def test_killed_processes_lose_no_finished_row(path: Path) -> None:
    killed_and_continued(path, kills=5, count=300)


@posix
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_kills_lose_no_finished_row(path: Path) -> None:
    killed_and_continued(path, kills=100, count=4000)


# Across studies.


def test_what_another_study_has_finished_is_adopted(tmp_path: Path) -> None:
    with Store(tmp_path / "one.sqlite") as one:
        one.put(row_of(1))
        one.put(replace(row_of(2), status="failed", error="no memory"))
        with Store(tmp_path / "two.sqlite") as two:
            two.put(replace(row_of(3), study="second"))
            keys = [key_of(number) for number in range(4)]
            assert two.adopt(keys, "second") == [key_of(1)]
            record = {"adopted_from": "s", **row_of(1).record}
            assert two.get(key_of(1)) == replace(row_of(1), study="second", record=record)
            assert not two.claim(key_of(1)), "it is done here now"
            assert two.claim(key_of(2)), "what failed elsewhere is tried here"
            assert two.adopt(keys, "second") == []
    with Store(tmp_path / "three.sqlite") as three:
        three.adopt(keys, "third")
        found = three.get(key_of(1))
        assert found is not None and found.record["adopted_from"] == "s", "who computed it"
        assert set(three.statuses()) == {key_of(1), key_of(3)}


def test_a_study_that_has_vanished_is_forgotten(tmp_path: Path) -> None:
    with Store(tmp_path / "one.sqlite") as one:
        one.put(row_of(1))
    (tmp_path / "one.sqlite").unlink()
    with Store(tmp_path / "two.sqlite") as two:
        assert two.adopt([key_of(1)], "second") == []
        assert two.claim(key_of(1)), "it is just computed again"
    assert siblings(tmp_path / "two.sqlite") == []
    assert len(list((tmp_path / "cache" / "studies").iterdir())) == 1


def test_a_study_that_cannot_be_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path / "one.sqlite") as one:
        one.put(row_of(1))
        one._db.execute("PRAGMA user_version = 7")
    with Store(tmp_path / "three.sqlite") as three:
        three.put(row_of(3))
    with Store(tmp_path / "two.sqlite") as two:
        assert two.adopt([key_of(1), key_of(3)], "second") == [key_of(3)]
    assert "version 7" in caplog.text


def test_without_a_cache_folder_nothing_is_shared_and_all_else_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    file = path.parent / "file"
    file.write_text("in the way")
    monkeypatch.setenv("ERRATA_CACHE", str(file))
    with Store(path) as store:
        assert store.adopt([key_of(1)], "s") == [] and store.put(row_of(1))
    assert "other studies will not find these results" in caplog.text
