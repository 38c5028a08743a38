"""Results as charts: what an experiment declares, drawn from the cells of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError
from errata.jobs.figures import bar_chart, line_chart, scatter_chart
from errata.jobs.studies.cells import Cell, Place, Run, cells, text
from errata.jobs.studies.shown import FigureSpec, TableSpec
from errata.jobs.studies.tables import heading, named, number, scale
from errata.measure.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = Mapping[str, Mapping[Place, Cell]]
"""Name of a series -> the place of each of its points -> the cell it is drawn from."""

NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Chart:
    """One chart of a figure."""

    title: str
    figure: Figure
    cells: tuple[Cell, ...]
    """What it is drawn from."""


def draw(spec: FigureSpec, runs: Sequence[Run]) -> list[Chart]:
    """All charts of a figure; where nothing is measured there is none.

    Raises:
        ConfigError: its fields do not tell all runs apart, or x is no number in a line chart.
    """
    first, second = len(spec.panels), len(spec.panels) + len(spec.series)
    across = spec.points if spec.kind == "scatter" else (spec.x,)
    panels: dict[Place, dict[str, dict[Place, Cell]]] = {}
    for place, cell in cells(runs, (*spec.panels, *spec.series, *across), spec.where).items():
        name = named(spec.series, place[first:second])
        panels.setdefault(place[:first], {}).setdefault(name, {})[place[second:]] = cell
    return [
        _chart(spec, named(spec.panels, panel), metric, measured)
        for panel, lines in panels.items()
        for metric in spec.y
        if (measured := _measured(lines, metric))
    ]


def as_table(spec: FigureSpec) -> TableSpec:
    """The numbers that a figure shows, as a table."""
    scatter = spec.kind == "scatter"
    return TableSpec(
        title=spec.title,
        rows=(*spec.panels, *spec.series, *(spec.points if scatter else (spec.x,))),
        metrics=(spec.x, *spec.y) if scatter else spec.y,
        where=spec.where,
    )


def axis(metric: str) -> str:
    """A metric as the name of an axis."""
    return metric if scale(metric) == 1 else f"{metric} (%)"


def _measured(lines: Lines, metric: str) -> dict[str, dict[Place, Cell]]:
    found = {
        name: {place: cell for place, cell in points.items() if metric in cell.summary}
        for name, points in lines.items()
    }
    return {name: points for name, points in found.items() if points}


def _chart(spec: FigureSpec, panel: str, metric: str, lines: Lines) -> Chart:
    title = ", ".join(filter(None, (panel, metric if len(spec.y) > 1 else ""))) or spec.title
    labels: dict[str, Any] = {"title": title, "y_label": axis(metric)}
    if spec.kind == "scatter":
        figure = scatter_chart(_dots(spec.x, metric, lines), x_label=axis(spec.x), **labels)
    elif spec.kind == "bar":
        figure = bar_chart(_bars(metric, lines), x_label=heading(spec.x), **labels)
    else:
        drawn = _curves(spec.x, metric, lines)
        figure = line_chart(drawn, x_label=heading(spec.x), log_x=spec.log_x, **labels)
    return Chart(title, figure, tuple(cell for line in lines.values() for cell in line.values()))


def _curves(x: str, metric: str, lines: Lines) -> dict[str, list[tuple[float, Estimate]]]:
    """Points of each line; what has no x, such as the unedited model, goes all the way across."""
    places = [place for points in lines.values() for (place,) in points if place is not None]
    xs = {place: _along(x, place) for place in places}
    ends = [min(xs.values()), max(xs.values())] if xs else []
    return {
        name: [
            (at, _estimate(cell, metric))
            for (place,), cell in points.items()
            for at in ([xs[place]] if place is not None else ends)
        ]
        for name, points in lines.items()
    }


def _along(x: str, place: Any) -> float:
    """Where a value stands on the axis; a list of one number, such as one layer, is that number.

    Raises:
        ConfigError: it is no number.
    """
    one = place[0] if isinstance(place, tuple) and len(place) == 1 else place
    if not isinstance(one, int | float):
        raise ConfigError(
            f'a line chart needs numbers as x; {x} is {text(place)}. Use kind = "bar".'
        )
    return one


def _bars(metric: str, lines: Lines) -> dict[str, dict[str, Estimate]]:
    groups: dict[str, dict[str, Estimate]] = {}
    for name, points in lines.items():
        for (place,), cell in points.items():
            groups.setdefault(text(place), {})[name] = _estimate(cell, metric)
    return groups


def _dots(x: str, y: str, lines: Lines) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(_estimate(cell, x).mean, _estimate(cell, y).mean) for cell in points.values()]
        for name, points in lines.items()
    }


def _estimate(cell: Cell, metric: str) -> Estimate:
    return number(cell, metric).estimate or NOTHING
