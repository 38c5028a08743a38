"""The machine that a result was computed on, and the processes on it."""

from __future__ import annotations

import os
import platform
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from errata.jobs.record import versions

_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where Linux tells a container's limit; "max" without one."""


def about(device: str = "cpu") -> dict[str, Any]:
    """The machine and the libraries, as a result's record tells them; bytes and JSON's types.

    Args:
        device: what the model runs on, as torch names it.
    """
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cores": cores(),
        "memory": memory(),
        "peak_memory": peak_memory(),
        "versions": versions(),
    }


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of memory that this process could have at most: the machine's, or its container's."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None  # the system does not tell
    with suppress(OSError, ValueError):
        total = min(total, int(_GROUP_LIMIT.read_text(encoding="ascii")))
    return total


def peak_memory() -> int | None:
    """Most bytes that this process has held at one time, since it began or `forget_peak_memory`."""
    with suppress(OSError):  # Linux; its getrusage would begin with what the parent held
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return None  # Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew, from what is held now; where the system cannot, it goes on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: resets VmHWM


def device_name(device: str = "cpu") -> str:
    """What a person calls the device: the processor's or the accelerator's model."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    if device != "cpu":
        return device
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def process_name() -> str:
    """This process among those of all hosts: "host:pid"."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_running(process: str) -> bool:
    """Whether a process may be alive; only one of this host can be known to be gone.

    Args:
        process: a name that begins as `process_name` does.
    """
    host, pid = process.split(":")[:2]
    if host != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(pid), 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True
