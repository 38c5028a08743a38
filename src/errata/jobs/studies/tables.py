"""Results as tables: what an experiment declares, filled with the cells of its runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.errors import ConfigError
from errata.jobs.report import estimate_text
from errata.jobs.studies.cells import Cell, Place, Run, cells, matching, text, value_of
from errata.jobs.studies.rows import flat
from errata.jobs.studies.shown import COSTS, FIELDS, METRICS, TableSpec, Where, check_name
from errata.jobs.studies.stream import IMMEDIATE
from errata.jobs.studies.units import SWEPT
from errata.measure.metrics import Estimate

UNSCALED = ("GE", f"{IMMEDIATE}GE", "perplexity ratio", "KL neighbours", "KL text", *COSTS)
"""Metrics that are no shares, like all perplexities: told as they are, not times 100."""

HEADLINES = (
    ("S", "ES", "PS", "NS", "EA", "DD", "Reliability", "Generality", "Locality", "Average"),
    ("rewrite.perplexity", "paraphrases.perplexity", "neighbours.perplexity"),
)
"""What is shown where nobody chose: of what was measured, that of the first group that has any."""

LACKING = "*"
"""Stands by a number of which some runs are lacking."""

NAMES = ("editor", "model", "method", "relation", "data")
"""Fields whose values say what they are."""


@dataclass(frozen=True)
class Number:
    """One number of a table, and the cell that it is of."""

    estimate: Estimate | None
    """As people read it; None where nothing was measured."""
    cell: Cell | None


@dataclass(frozen=True)
class Table:
    """What a table says, line by line."""

    title: str
    fields: tuple[str, ...]
    """Headings of the labels."""
    groups: tuple[tuple[str, int], ...]
    """Headings over the metrics, and how many columns each spans; none without `columns`."""
    metrics: tuple[str, ...]
    """Headings of the numbers."""
    lines: tuple[tuple[tuple[str, ...], tuple[Number, ...]], ...]
    """Labels and numbers of each."""


def tabulate(spec: TableSpec, runs: Sequence[Run]) -> Table:
    """Fill a table.

    Raises:
        ConfigError: its fields do not tell all runs apart; the message names what is missing.
    """
    found = cells(runs, (*spec.rows, *spec.columns), spec.where)
    across = dict.fromkeys(place[len(spec.rows) :] for place in found)
    down = dict.fromkeys(place[: len(spec.rows)] for place in found)
    return Table(
        title=spec.title,
        fields=tuple(map(heading, spec.rows)),
        groups=tuple((named(spec.columns, column), len(spec.metrics)) for column in across)
        if spec.columns
        else (),
        metrics=spec.metrics * len(across),
        lines=tuple(
            (
                tuple(map(text, line)),
                tuple(
                    number(found.get((*line, *column)), metric)
                    for column in across
                    for metric in spec.metrics
                ),
            )
            for line in down
        ),
    )


def overview(
    runs: Sequence[Run], metrics: Sequence[str] = (), where: Where | None = None
) -> TableSpec:
    """The table of everything: a line for each unit but for its seed.

    Args:
        runs: of an experiment.
        metrics: its columns; by default the main ones that were measured.
        where: only these.

    Raises:
        ConfigError: there is no such metric or field, or nothing has these values.
    """
    for name in metrics:
        check_name(name, METRICS, "metrics")
    for name in where or {}:
        check_name(name, FIELDS, "where")
    runs = matching(runs, where or {})
    if not runs:
        raise ConfigError(
            f"nothing here has {named(tuple(where or ()), tuple((where or {}).values()))}."
        )
    measured = {name for run in runs if run.row for name in run.row.metrics}
    units: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        units[run.unit["label"], run.unit["model"]].append(run.unit)
    settings = {f"settings.{name}" for run in runs for name in flat(run.unit["settings"])}
    varied = [
        name
        for name in (*SWEPT, *sorted(settings))
        if any(len({value_of(unit, name) for unit in group}) > 1 for group in units.values())
    ]
    return TableSpec(
        title="All results",
        rows=("model", "editor", *varied),
        metrics=tuple(metrics) or _headline(measured),
        where=where or {},
    )


def _headline(measured: Collection[str]) -> tuple[str, ...]:
    found = (tuple(name for name in group if name in measured) for group in HEADLINES)
    return next(filter(None, found), HEADLINES[0][:4])


def number(cell: Cell | None, metric: str) -> Number:
    """A cell's estimate as people read it: shares times 100."""
    estimate = cell.summary.get(metric) if cell else None
    return Number(estimate and scaled(estimate, metric), cell)


def number_text(number: Number) -> tuple[str, str]:
    """A number and its interval, for people; a sign where some of its runs are lacking."""
    mean, span = estimate_text(number.estimate)
    return mean + (LACKING if number.estimate and number.cell and number.cell.lacking else ""), span


def scaled(estimate: Estimate, metric: str) -> Estimate:
    """As people read it: shares times 100."""
    mean, low, high, n = estimate
    factor = scale(metric)
    return Estimate(factor * mean, factor * low, factor * high, n)


def scale(metric: str) -> int:
    """What a metric is multiplied by for people."""
    return 1 if metric in UNSCALED or metric.endswith("perplexity") else 100


def heading(name: str) -> str:
    """A field as a heading: `protocol.batch` is "batch"."""
    return "protocol" if name == "protocol.kind" else name.rpartition(".")[2]


def named(fields: Sequence[str], place: Place) -> str:
    """Such as `pocket, batch 16`: values that do not say by themselves what they are, named."""
    return ", ".join(
        text(value) if name in NAMES else f"{heading(name)} {text(value)}"
        for name, value in zip(fields, place, strict=True)
    )
