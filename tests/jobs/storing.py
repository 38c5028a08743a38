"""Rows to store, and a process that stores them, for tests to start several of, and to kill."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier

from errata.jobs.studies.store import Row, Store
from errata.measure.metrics import Estimate


def key_of(number: int) -> str:
    return f"{number:064x}"


def row_of(number: int, cases: int = 30) -> Row:
    """The result of unit `number`: always the same, but for its time."""
    draw = random.Random(number)
    shares = [draw.random() for _ in range(cases)]
    mean = sum(shares) / cases if cases else 0.0
    return Row(
        key=key_of(number),
        study="s",
        unit={
            "model": ("pocket", "pocket-llama")[number % 2],
            "label": "MEMIT",
            "settings": {"layers": [0, 1], "target": {"clamp": number / 8}},
            "data": "pocket",
            "batch": number,
        },
        metrics={"ES": Estimate(mean, mean - 0.1, mean + 0.1, cases)},
        cases=tuple({"case_id": i, "metrics": {"ES": share}} for i, share in enumerate(shares)),
        points=tuple(
            {"edits": 8 * (i + 1), "metrics": {"ES": [share, 0.0, 1.0, 8]}}
            for i, share in enumerate(shares[:2])
        ),
        record={"versions": {"errata": "0"}},
        seconds=0.25,
        created="2026-01-01T00:00:00+00:00",
    )


def work(
    path: str,
    count: int,
    told: str,
    computed: str | None = None,
    together: Barrier | None = None,
) -> None:
    """Compute units 0 to count - 1, each unless it is done or taken, until all are done.

    The key of each row goes to the file `told` once it is stored, and to `computed` once it is
    computed; then comes a pause, so that another process finds units taken. With `together` no
    process begins before all have come.
    """
    with Store(path) as store:
        if together is not None:
            together.wait(60)
        while len(store.statuses()) < count:
            for key in map(key_of, range(count)):
                if not store.claim(key):
                    continue
                row = replace(row_of(int(key, 16)), record={"worker": store.owner})
                if computed is not None:
                    write_line(computed, key)
                    time.sleep(0.01)
                if store.put(row):
                    write_line(told, key)
            time.sleep(0.01)


def hold(path: str, key: str) -> None:
    """Claim one unit and never finish it."""
    with Store(path) as store:
        store.claim(key)
        time.sleep(600)


def write_line(path: str, line: str) -> None:
    """Add a line in one system call: it is there in whole even if we are killed right after."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{line}\n".encode())
    os.close(file)
