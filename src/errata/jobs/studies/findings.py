"""All that the report of a study tells, gathered from its results, whatever form it then takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.jobs.report import size_text
from errata.jobs.studies.cells import Run, name_of, text, value_of
from errata.jobs.studies.charts import Chart, as_table, draw
from errata.jobs.studies.claims import Claim, judge
from errata.jobs.studies.results import Results
from errata.jobs.studies.rows import Row, flat
from errata.jobs.studies.tables import Table, heading, overview, tabulate
from errata.jobs.studies.units import UNEDITED, Unit

READING = (
    "Each number is a mean over cases with its 95% interval, and leads to the runs that it is of. "
    "Each seed draws a sample of its own; a case that is in several counts once, with the mean of "
    "its values. Shares are told times 100."
)
"""How to read a report."""


@dataclass(frozen=True)
class FigureShown:
    """A figure: its charts and the same as numbers."""

    title: str
    charts: tuple[Chart, ...]
    numbers: Table


@dataclass(frozen=True)
class RunShown:
    """One run of a unit."""

    seed: int
    key: str
    state: str
    """`done`, `failed` or `not done yet`."""
    told: str
    """How many cases, how many requests failed; or why the run did."""


@dataclass(frozen=True)
class UnitShown:
    """What numbers lead to: a unit with the runs of all its seeds."""

    name: str
    """Of its anchor."""
    what: str
    config: str
    """The method's numbers as JSON; empty for the unedited model."""
    runs: tuple[RunShown, ...]


@dataclass(frozen=True)
class Machine:
    """Where, when and how long a run was computed."""

    key: str
    host: str
    """And the experiment that computed it, if that was another."""
    seconds: float
    memory: str
    created: str
    versions: str


@dataclass(frozen=True)
class Findings:
    """Everything that a report tells, whatever its form."""

    name: str
    title: str
    reading: str
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    figures: tuple[FigureShown, ...]
    units: tuple[UnitShown, ...]
    machines: tuple[Machine, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """(how many runs are done, how many there are)."""
        wanted = sum(len(unit.runs) for unit in self.units)
        return wanted - len(self.lacking), wanted

    @property
    def lacking(self) -> list[tuple[UnitShown, RunShown]]:
        """The runs that have no results."""
        return [(unit, run) for unit in self.units for run in unit.runs if run.state != "done"]


def gather(results: Results) -> Findings:
    """All that there is to tell.

    Raises:
        ConfigError: a table, figure or claim does not fit the experiment; it is named.
    """
    shown, runs = results.shown, results.runs
    return Findings(
        name=results.experiment.name,
        title=results.experiment.title,
        reading=READING,
        claims=tuple(judge(claim, runs) for claim in shown.claims),
        tables=tuple(tabulate(table, runs) for table in shown.tables or [overview(runs)]),
        figures=tuple(
            FigureShown(figure.title, tuple(draw(figure, runs)), tabulate(as_table(figure), runs))
            for figure in shown.figures
        ),
        units=_units(runs),
        machines=tuple(_machine(row) for row in results.rows if row.status == "done"),
    )


def _units(runs: Sequence[Run]) -> tuple[UnitShown, ...]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(name_of(run.unit), []).append(run)
    return tuple(_unit(name, members) for name, members in groups.items())


def _unit(name: str, runs: Sequence[Run]) -> UnitShown:
    unit = runs[0].unit
    settings = [
        f"{heading(n)} {text(value_of(unit, f'settings.{n}'))}" for n in flat(unit["settings"])
    ]
    configs = [run.row.record.get("config") for run in runs if run.row]
    config = {k: v for k, v in next(filter(None, configs), {}).items() if k != "seed"}
    return UnitShown(
        name=name,
        what=", ".join([_described(unit), *settings]),
        config=json.dumps(config, indent=1, ensure_ascii=False) if config else "",
        runs=tuple(_run(run) for run in runs),
    )


def _described(unit: Mapping[str, Any]) -> str:
    """A unit in words, without its seed."""
    if unit["method"] == UNEDITED:
        return f"{unit['label']} {unit['model']}"
    return str(Unit.from_dict(unit)).rpartition(", seed ")[0]


def _run(run: Run) -> RunShown:
    seed, row = run.unit["seed"], run.row
    if row is None:
        return RunShown(seed, "", "not done yet", "")
    if row.status == "failed":
        return RunShown(seed, row.key, "failed", row.error)
    failed, stopped = row.record.get("failed", 0), row.record.get("stopped", "")
    told = [f"{len(row.cases)} cases"]
    told += [f"{failed} requests failed"] if failed else []
    told += [f"stopped {stopped}"] if stopped else []
    return RunShown(seed, row.key, "done", ", ".join(told))


def _machine(row: Row) -> Machine:
    record = row.record
    memory, adopted = record.get("peak_memory"), record.get("adopted_from")
    told = [f"by {adopted}"] if adopted else []
    told += [str(record[n]) for n in ("host", "device", "platform") if record.get(n)]
    return Machine(
        key=row.key,
        host=", ".join(told),
        seconds=row.seconds,
        memory=size_text(memory) if memory else "",
        created=row.created,
        versions=", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items()),
    )
