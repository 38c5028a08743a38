"""Keeping results: claims and rows with a hundred cases each, in one database.

There is no model in it, only the disk. The baseline is the plainest store that a killed process
cannot spoil: a JSON file for each unit, written aside, synchronised and renamed. The floor is the
same JSON appended to one file that is synchronised after each unit.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measure import Row as Line
from benchmarks.sections import Bench
from errata.jobs.files import write_text
from errata.jobs.studies.rows import Row, to_json
from errata.jobs.studies.store import Store
from errata.measure.metrics import interval

UNITS = 50
CASES = 100
QUESTIONS = 13
"""Of a whole case: the prompt, two paraphrases, ten neighbours."""

METRICS = ("ES", "EM", "PS", "PM", "NS", "NM", "rewrite.token", "paraphrases.token")


def store(bench: Bench) -> Iterator[Line]:
    """Claim and put of every unit, with each case's metrics alone, and with all that was asked."""
    yield _measured(bench, "metrics of", 0)
    yield _measured(bench, "all of", QUESTIONS)


def _measured(bench: Bench, what: str, questions: int) -> Line:
    rows = made_up(questions)
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, ERRATA_CACHE=name):
        folder = Path(name)
        ours, plain, floor = (
            min(_seconds(do, rows, folder / f"{do.__name__}-{i}") for i in range(bench.rounds))
            for do in (in_a_database, in_files, appended)
        )
        file = folder / "in_a_database-0" / "study.sqlite"
        with Store(file) as kept:
            same = kept.rows(cases=True) == rows
        size = file.stat().st_size
    told = f"{1000 * ours / UNITS:.2f} ms and {size / UNITS / 1e3:.0f} kB a unit"
    return Line(
        section="store",
        model=bench.setting.name,
        what=f"{UNITS} units, {what} {CASES} cases each",
        seconds=ours,
        serial_seconds=plain,
        difference=0.0 if same else 1.0,
        tolerance=0.0,
        peak=None,
        serial_peak=None,
        floor=floor,
        note=told,
    )


def made_up(questions: int) -> list[Row]:
    """Rows of a study whose cases hold so many questions beside their metrics."""
    draw = random.Random(0)

    def case(number: int) -> dict[str, Any]:
        asked = [
            {
                "prompt": f"The official language of the place that was number {number} is",
                "answer": "Portuguese",
                "nll": draw.random(),
                "rival": "Swedish",
                "rival_nll": draw.random(),
                "hits": [True, False],
                "says": "English, which is also spoken in",
            }
            for _ in range(questions)
        ]
        return {
            "case_id": str(number),
            "relation": "P37",
            "metrics": {metric: draw.random() for metric in METRICS},
            "neighbours": asked,
        }

    rows = []
    for number in range(UNITS):
        cases = tuple(map(case, range(CASES)))
        rows.append(
            Row(
                key=f"{number:064x}",
                study="benchmark",
                unit={"model": "pocket", "label": "MEMIT", "settings": {}, "seed": number},
                metrics={m: interval([case["metrics"][m] for case in cases]) for m in METRICS},
                cases=cases,
            )
        )
    return rows


def in_a_database(rows: Sequence[Row], folder: Path) -> None:
    """Ours."""
    with Store(folder / "study.sqlite") as results:
        for row in rows:
            if results.claim(row.key):
                results.put(row)


def in_files(rows: Sequence[Row], folder: Path) -> None:
    """A file for each unit, there whole or not at all."""
    for row in rows:
        write_text(folder / f"{row.key}.json", json.dumps(vars(row)))


def appended(rows: Sequence[Row], folder: Path) -> None:
    """A line for each unit."""
    folder.mkdir()
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(to_json(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _seconds(do: Callable[[Sequence[Row], Path], None], rows: Sequence[Row], folder: Path) -> float:
    """By the clock on the wall: what waits for the disk is not the process' own time."""
    began = time.perf_counter()
    do(rows, folder)
    return time.perf_counter() - began


STORE_SECTIONS: dict[str, Callable[[Bench], Iterator[Line]]] = {"store": store}
"""Name on the command line -> section."""
