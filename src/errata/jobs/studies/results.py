"""The results of an experiment, read back: what it asked for and what is there of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.errors import StorageError
from errata.jobs.studies.cells import Run
from errata.jobs.studies.declared import declared
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.rows import Row
from errata.jobs.studies.run import FOLDER, store_path
from errata.jobs.studies.shown import Shown
from errata.jobs.studies.store import Store


@dataclass(frozen=True)
class Results:
    """An experiment with its runs, in its own order."""

    experiment: Experiment
    shown: Shown
    runs: tuple[Run, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows that are there, done or failed."""
        return [run.row for run in self.runs if run.row is not None]


def read_results(name: str | Path, folder: Path | str = FOLDER) -> Results:
    """Read an experiment's file and its results.

    Where results were computed again, with other code or another model of that name, the latest
    count. Rows that the file no longer asks for are left aside.

    Args:
        name: of the experiment, or its file.
        folder: where results are kept.

    Raises:
        ConfigError: the file is not there, or something in it is wrong.
        StorageError: nothing has been computed yet, or the results cannot be read.
    """
    experiment = Experiment.load(name)
    shown = declared(experiment)
    path = store_path(experiment, folder)
    if not path.exists():
        raise StorageError(
            f"there are no results of {experiment.name} yet (no file {path}). Compute them with: "
            f"errata run {name}"
        )
    with Store(path, read_only=True) as store:
        rows = store.rows(cases=True)
    latest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.status == "done", row.created, row.key)):
        latest[_identity(row.unit)] = row
    units = [unit.to_dict() for unit in experiment.units()]
    return Results(
        experiment, shown, tuple(Run(unit, latest.get(_identity(unit))) for unit in units)
    )


def _identity(unit: Mapping[str, Any]) -> str:
    return json.dumps(unit, sort_keys=True)
