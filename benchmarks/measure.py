"""Seconds, bytes and floors."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from benchmarks.settings import Setting
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Measured(Generic[A]):
    """What something gave and took."""

    value: A
    seconds: float
    peak: int | None
    """Bytes at the peak beyond those held before; None where the system does not tell."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    model: str
    what: str
    seconds: float
    serial_seconds: float
    difference: float | None
    """Largest relative difference between the two results; None where they are not compared."""
    tolerance: float | None
    peak: int | None
    serial_peak: int | None
    floor: float
    """Seconds that our multiplications take as plain matrix products."""
    goal: float | None = None
    """The ratio that issue 2 wants on this model."""
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster than serial."""
        return self.serial_seconds / self.seconds

    @property
    def agrees(self) -> bool | None:
        """Whether the results are the same, to the tolerance; None where they are not compared."""
        if self.difference is None or self.tolerance is None:
            return None
        return self.difference <= self.tolerance

    @property
    def over_floor(self) -> float:
        """Our time over the floor."""
        return self.seconds / self.floor


def measured(do: Callable[[], A], device: torch.device) -> Measured[A]:
    """Run once, with seconds and peak memory.

    On one CPU thread the seconds are the process' own, so that another program on the machine
    costs neither side anything.
    """
    gc.collect(1)  # all generations take half a second, which is long beside small models
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else _settled_rss()
    began = _now(device)
    value = do()
    seconds = _now(device) - began
    peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    return Measured(value, seconds, None if held is None or peak is None else peak - held)


def alternated(
    serial: Callable[[], A], ours: Callable[[], B], device: torch.device, rounds: int = 3
) -> tuple[Measured[A], Measured[B]]:
    """Both in turn, `rounds` times; the fastest of each."""
    runs = [(measured(serial, device), measured(ours, device)) for _ in range(rounds)]
    slow = min((run[0] for run in runs), key=lambda run: run.seconds)
    return slow, min((run[1] for run in runs), key=lambda run: run.seconds)


def each_within(
    do: Sequence[Callable[[], A]], seconds: float, device: torch.device
) -> Measured[list[A]]:
    """Run one after another, as many as fit into `seconds`, and at least one."""

    def run() -> list[A]:
        began, values = _now(device), [do[0]()]
        for one in do[1:]:
            spent = _now(device) - began
            if spent + spent / len(values) > seconds:
                break
            values.append(one())
        return values

    return measured(run, device)


def off(ours: Tensor, serial: Tensor) -> float:
    """Largest relative difference of two results: of rows, by their norms."""
    ours, serial = ours.double().cpu().flatten(1), serial.double().cpu().flatten(1)
    return float(((ours - serial).norm(dim=1) / serial.norm(dim=1)).max())


def rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Multiplications a second of this machine, now, in plain matrix products."""
    best = 0.0
    for rows in 256, 1024, 4096:
        a = torch.ones(rows, width, device=device, dtype=dtype)
        b = torch.ones(width, 4 * width, device=device, dtype=dtype)
        repeats = min(100, max(1, int(3e8 // (rows * 4 * width * width))))
        for _ in range(4):
            began = _now(device)
            for _ in range(repeats):
                a @ b
            best = max(best, repeats * rows * 4 * width * width / (_now(device) - began))
    return best


def rate_of(setting: Setting) -> float:
    """The rate in the model's dtype and width."""
    return rate(setting.lm.device, setting.lm.dtype, setting.lm.d_model)


def block_products(lm: LanguageModel, first: int, last: int) -> int:
    """Multiplications of one token in the matrices of blocks `first` to `last`."""
    return sum(
        weight.numel()
        for layer in range(first, last + 1)
        for weight in lm.block(layer).parameters()
        if weight.ndim == 2
    )


def head_products(lm: LanguageModel) -> int:
    """Multiplications of one token in the head."""
    return weight_out_in(lm.head).numel()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _settled_rss() -> int | None:
    """Bytes held now, after giving back what is free; the peak starts anew from here."""
    if platform.system() != "Linux":
        return None
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else None
