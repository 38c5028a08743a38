"""A study whose results are made up: an experiment file, and a store filled without any model."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.jobs.studies.cells import Cell, Run, cells
from errata.jobs.studies.experiment import Experiment, Unit
from errata.jobs.studies.results import Results, read_results
from errata.jobs.studies.rows import Row, to_json
from errata.jobs.studies.run import store_path
from errata.jobs.studies.store import Store
from errata.measure.metrics import Estimate
from errata.measure.score import Scores

EXPERIMENT = """
title = "Made up"
models = ["pocket", "pocket-llama"]
data = "pocket"
count = 40
seeds = [0, 1]

[protocol]
kind = "batch"

[[editor]]
label = "MEMIT"
method = "memit"

[[editor]]
label = "EMMET"
method = "emmet"

[[editor]]
method = "none"

[sweep]
"protocol.batch" = [1, 4, 16]
"""
"""Two models, two seeds, two editors by three batch sizes, and the unedited model: 28 units."""

Cases = Sequence[Mapping[str, Any]]


def case(number: int, relation: str = "capital", **metrics: float) -> dict[str, Any]:
    """One case of a row."""
    return {"case_id": str(number), "relation": relation, "metrics": metrics}


def answers(unit: Unit) -> Cases:
    """What the made-up methods score on 30 cases: MEMIT all, EMMET less the larger the batch.

    Seeds 0 and 1 share 20 of their cases.
    """
    wrong = {"MEMIT": 0, "EMMET": {4: 1, 16: 12}.get(unit.batch, 0), "unedited": 30}[unit.label]
    first = 10 * unit.seed
    return [
        case(
            number,
            ("capital", "currency")[number % 2],
            ES=float(number - first >= wrong),
            PS=0.5 + 0.5 * (number - first >= wrong),
            NS=0.9,
        )
        for number in range(first, first + 30)
    ]


def row(unit: Unit, cases: Cases, **fields: Any) -> Row:
    """A finished row of a unit."""
    values = unit.to_dict()
    return Row(
        key=hashlib.sha256(to_json(values).encode()).hexdigest(),
        study="made-up",
        unit=values,
        metrics=Scores(tuple(dict(one) for one in cases)).summary() if cases else {},
        cases=tuple(cases),
        **{
            "record": {"config": {"relaxation": 0.05, "seed": unit.seed}, "failed": 0},
            "created": f"2026-01-01T00:00:0{unit.seed}+00:00",
            **fields,
        },
    )


def runs_of(text: str, measured: Callable[[Unit], Cases] = answers) -> list[Run]:
    """All runs of an experiment, without a store."""
    units = Experiment._read(Path("made-up.toml"), tomllib.loads(text)).units()
    return [Run(unit.to_dict(), row(unit, measured(unit))) for unit in units]


def saved(
    folder: Path,
    text: str = EXPERIMENT,
    measured: Callable[[Unit], Row | None] = lambda unit: row(unit, answers(unit)),
    *,
    backwards: bool = False,
) -> Path:
    """Write the experiment's file and its results; returns the file."""
    file = folder / "made-up.toml"
    file.write_text(text, encoding="utf-8")
    experiment = Experiment.load(file)
    units = experiment.units()
    with Store(store_path(experiment, folder)) as store:
        for unit in reversed(units) if backwards else units:
            if (found := measured(unit)) is not None:
                store.put(found)
    return file


def results_of(folder: Path, text: str = EXPERIMENT, **options: Any) -> Results:
    """The same, read back."""
    return read_results(saved(folder, text, **options), folder)


def point(batches: int, **metrics: float) -> dict[str, Any]:
    """One point of a stream; each estimate is 0.1 to either side."""
    told = {name: Estimate(x, x - 0.1, x + 0.1, 10) for name, x in metrics.items()}
    return {"edits": batches, "batches": batches, "metrics": told, "norms": {}}


RUNS = runs_of(EXPERIMENT)
"""What all of EXPERIMENT gave."""


def cell(editor: str = "MEMIT", batch: int = 4, **where: Any) -> Cell:
    """One cell of RUNS, on pocket."""
    chosen = {"model": "pocket", "editor": editor, "protocol.batch": batch, **where}
    return cells(RUNS, (), chosen)[()]


def two_seeds(first: Cases, second: Cases) -> Cell:
    """The cell of one editor on one model, with these cases in its two runs."""
    text = EXPERIMENT.replace(', "pocket-llama"', "").replace("[1, 4, 16]", "[4]")
    runs = runs_of(text, lambda unit: (first, second)[unit.seed])
    return cells(runs, (), {"editor": "MEMIT"})[()]
