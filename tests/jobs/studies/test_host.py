"""What is told of the machine and its processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from errata.jobs.studies import host


def test_what_a_record_tells_is_json() -> None:
    told = host.about()
    assert json.loads(json.dumps(told)) == told
    assert told["versions"]["python"].count(".") == 2
    assert told["device"] and told["platform"] and told["host"]
    assert 1 <= told["cores"] <= (os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_memory_is_in_bytes() -> None:
    total, peak = host.memory(), host.peak_memory()
    assert total is not None and peak is not None
    assert 10e6 < peak < total < 1e15


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_the_peak_rises_by_what_is_held_and_does_not_fall() -> None:
    """In a process of its own, since the tests before may have held more."""
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    with ProcessPoolExecutor(1, context) as pool:
        with_it, after = pool.submit(peaks).result()
    assert 190e6 < with_it < 260e6
    assert after == pytest.approx(with_it, abs=2e6)  # the system counts in portions


def peaks() -> tuple[int, int]:
    """By how much the peak has risen while 200 MB are held, and after."""
    before = host.peak_memory() or 0
    held = bytearray(200_000_000)
    held[::4096] = bytes(len(held[::4096]))  # touched, hence really there
    with_it = host.peak_memory() or 0
    del held
    return with_it - before, (host.peak_memory() or 0) - before


@pytest.mark.skipif(sys.platform != "linux", reason="containers' limits are Linux's")
def test_a_containers_limit_is_the_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(host, "_GROUP_LIMIT", limit)
    machine = host.memory()
    limit.write_text("50000000\n")
    assert host.memory() == 50_000_000
    limit.write_text("max\n")
    assert host.memory() == machine


@pytest.mark.skipif(os.name != "posix", reason="not told on Windows")
def test_a_process_is_running_until_it_has_ended() -> None:
    here = host.process_name()
    assert host.is_running(here) and host.is_running(f"{here}:more")
    name, _, _ = here.partition(":")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert host.is_running(f"{name}:{child.pid}")
        child.kill()
    assert not host.is_running(f"{name}:{child.pid}")


def test_of_another_host_nothing_is_known() -> None:
    assert host.is_running("elsewhere:1:abc")


def test_devices_have_names() -> None:
    assert host.device_name("mps") == "mps"
    assert host.device_name("cpu") not in ("", "cpu")
