"""Work spread over processes and Ray: the same values, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.errors import ClusterError, ConfigError, ErrataError, ModelLoadError
from errata.jobs import cluster
from errata.jobs.cluster import Where, held, map_

Job = tuple[str, Any]


def work(job: Job) -> Any:
    """One kind of item for each thing that can happen."""
    kind, value = job
    if kind == "die once":
        mark = Path(value)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return f"survived after {mark.name}"
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "refuse":
        raise ErrataError(f"no {value}")
    if kind == "fail":
        raise ValueError(f"bug at {value}")
    if kind == "unpicklable":
        return threading.Lock()
    if kind == "model":
        same = held(value) is held(value)
        return {"same": same, "total": total(value), "threads": torch.get_num_threads()}
    return {"square": value**2, "tensor": torch.full((3,), float(value))}


def total(model: str) -> float:
    return float(sum(weight.detach().double().sum() for weight in held(model).network.parameters()))


def jobs_for(folder: Path) -> list[Job]:
    return [
        ("square", 2),
        ("die once", str(folder / "mark")),
        ("refuse", "way"),
        ("fail", 7),
        ("die", None),
        ("unpicklable", 1),
        ("model", "pocket"),
        *(("square", n) for n in range(20)),
    ]


def run(jobs: list[Job], on: Where, **options: Any) -> dict[int, Any]:
    found = list(map_(work, jobs, on=on, workers=2, **options))
    assert sorted(done.index for done in found) == list(range(len(jobs)))  # each of them once
    return {done.index: done for done in found}


def check(found: dict[int, Any], jobs: list[Job], tries: int) -> None:
    """What died, refused and failed is told; everything else is as in a loop."""
    assert found[1].value == "survived after mark" and found[1].error is None
    assert found[2].error == "no way" and found[2].value is None
    assert found[3].error is not None
    assert "Traceback" in found[3].error and "ValueError: bug at 7" in found[3].error
    assert found[4].error is not None
    assert f"died {tries} times" in found[4].error and "fewer workers" in found[4].error
    assert found[5].error is not None and "pickle" in found[5].error
    assert found[6].value["same"] and found[6].value["total"] == total("pocket")
    assert found[6].value["threads"] <= max(1, (os.cpu_count() or 1) // 2)
    for index, done in run(jobs[7:], "loop").items():
        assert done.error is None is found[7 + index].error
        ours, theirs = found[7 + index].value, done.value
        assert ours["square"] == theirs["square"]
        assert torch.equal(ours["tensor"], theirs["tensor"])


def test_processes_do_what_a_loop_does_and_outlive_dead_workers(tmp_path: Path) -> None:
    told: list[int] = []
    jobs = jobs_for(tmp_path)
    found = run(jobs, "processes", tries=2, progress=lambda stage, done, total: told.append(done))
    check(found, jobs, tries=2)
    assert told == list(range(1, len(jobs) + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_does_what_a_loop_does_and_outlives_dead_workers(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    jobs = jobs_for(tmp_path)
    check(run(jobs, "ray", tries=2), jobs, tries=2)
    assert not ray.is_initialized()  # what was started is ended


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_that_runs_already_is_used_and_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = run([("square", n) for n in range(4)], "ray")
        assert [found[n].value["square"] for n in range(4)] == [0, 1, 4, 9]
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_a_loop_tells_failures_and_goes_on() -> None:
    found = run([("refuse", "way"), ("fail", 7), ("square", 3)], "loop")
    assert found[0].error == "no way"
    assert "ValueError: bug at 7" in str(found[1].error)
    assert found[2].value["square"] == 9 and found[2].seconds >= 0


@pytest.mark.parametrize("on", cluster.WHERE)
def test_what_cannot_be_sent_is_refused_before_anything_runs(on: Where) -> None:
    def inner(x: int) -> int:
        return x

    with pytest.raises(ClusterError, match=r"the function .*top level"):
        map_(lambda x: x, [1], on=on)
    with pytest.raises(ClusterError, match=r"the function .*top level"):
        map_(inner, [1], on=on)
    items: list[Job] = [("square", 1), ("square", inner)]
    with pytest.raises(ClusterError, match="item 1 .*plain values"):
        map_(work, items, on=on)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": "moon"}, "loop, processes, ray; not on 'moon'"),
        ({"workers": 0}, "workers must be 1 or more, got 0"),
        ({"tries": 0}, "tries must be 1 or more, got 0"),
        ({"on": "processes", "address": "auto"}, "'processes' has none"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        map_(work, [("square", 1)], **options)


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"errata\[ray\]"):
        map_(work, [("square", 1)], on="ray")


def test_a_ray_cluster_that_does_not_answer_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"cannot reach the Ray cluster at {address}"):
            map_(work, [("square", 1)], on="ray", address=address)


@pytest.mark.parametrize("on", cluster.WHERE)
def test_no_items_start_nothing(on: Where) -> None:
    assert list(map_(work, [], on=on)) == []


def test_one_model_is_held_at_a_time() -> None:
    first = held("pocket")
    assert held("pocket") is first
    other = held("pocket", "float64")
    assert other.dtype == torch.float64
    assert held("pocket") is not first
    with pytest.raises(ModelLoadError):
        held("./nowhere")


SCRIPT = """
import sys, time
from errata.jobs.cluster import map_

def nap(seconds):
    import os
    open(os.path.join(sys.path[0], f"{os.getpid()}.pid"), "w").close()
    time.sleep(seconds)

def main():
    for done in map_(nap, [100] * 4, on="processes", workers=2):
        print(done)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts the script with a last line of one's own; ends it, should the test fail."""
    running: list[subprocess.Popen[str]] = []

    def start(last: str) -> subprocess.Popen[str]:
        (tmp_path / "script.py").write_text(SCRIPT + last)
        command = [sys.executable, str(tmp_path / "script.py")]
        running.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        )
        return running[0]

    yield start
    running[0].kill()
    running[0].communicate()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupt_ends_all_workers(
    tmp_path: Path, started: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = started('if __name__ == "__main__": main()')
    deadline = time.monotonic() + 300
    while len(found := list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    workers = [int(path.stem) for path in found]
    assert all(map(alive, workers))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = process.communicate(timeout=60)
    assert told.count("KeyboardInterrupt") == 1  # of the script itself, none of its workers
    assert not any(map(alive, workers))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_script_without_a_guard_is_told_so(
    started: Callable[[str], subprocess.Popen[str]],
) -> None:
    _, told = started("main()").communicate(timeout=500)
    assert 'if __name__ == "__main__"' in told.splitlines()[-1]
    assert "ClusterError" in told
