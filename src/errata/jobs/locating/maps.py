"""Heat maps and lines of causal tracing: where restoring brings an answer back.

Colours follow the literature: purple for states, green for MLPs, red for attention, each from light
to dark. Where a map has room, each cell also says its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.jobs.figures import (
    INK,
    SOFT,
    blank,
    clipped,
    counted,
    draw_line,
    head,
    layer_ticks,
    legend,
    style,
    subtitle,
)
from errata.locate.tracing import AverageEffect, Trace
from errata.measure.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

MAPS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}
"""Sequential colour maps in even steps of lightness."""

NUMBERED = 16
"""Up to so many layers, each cell of a map says its value."""


def restored(trace: Trace | AverageEffect) -> str:
    """What was put back, in words."""
    if trace.kind == "state":
        told = "one state"
    else:
        part = "MLPs" if trace.kind == "mlp" else "attentions"
        told = f"{part} of {trace.window} layers" if trace.window > 1 else part[:-1]
    return f"{told}, {trace.severed} severed" if trace.severed else told


def by_token(one: Trace | AverageEffect) -> list[tuple[str, list[Estimate]]]:
    """Each token, or class of tokens, with its indirect effect in each layer."""
    if isinstance(one, Trace):
        names: Sequence[str] = [token.strip() for token in one.tokens]
        tables = [[Estimate(e, math.nan, math.nan, 1) for e in row] for row in one.effects]
    else:
        names = one.classes
        tables = [
            [Estimate(*values) for values in zip(*rows, strict=True)]
            for rows in zip(one.mean, one.low, one.high, one.n, strict=True)
        ]
    return list(zip(names, tables, strict=True))


def heat_maps(traces: Sequence[Trace]) -> Figure:
    """The answer's probability by what was restored, tokens x layers.

    Traces of one fact stand side by side, on one scale from P* to the largest P.

    The subject's tokens are starred.
    """
    first = traces[0]
    answer = first.answer.strip()
    rows = [
        clipped(_shown(token), 16) + ("*" if first.subject[0] <= place <= first.subject[1] else "")
        for place, token in enumerate(first.tokens)
    ]
    top = max(first.clean, *(p for trace in traces for row in trace.probabilities for p in row))
    layers = len(first.probabilities[0])
    with style():
        figure, panels = blank(
            1.2 + len(traces) * _width(layers), 1.6 + 0.3 * len(rows), len(traces)
        )
        for axes, trace in zip(panels, traces, strict=True):
            mesh = _map(axes, trace.probabilities, MAPS[trace.kind], first.corrupted, top)
            _label(axes, rows if axes is panels[0] else [], restored(trace))
            _scale(figure, axes, mesh, f"P({clipped(answer, 16)})" if axes is panels[-1] else "")
        head(
            figure,
            f"{first.request.text} \N{RIGHTWARDS ARROW} {answer}",
            f"P({clipped(answer, 24)}) is {first.clean:.2f}; {first.corrupted:.2f} is left where "
            "noise hides the subject (*)",
        )
    return figure


def average_maps(averages: Sequence[AverageEffect]) -> Figure:
    """Mean indirect effects over facts, token classes x layers, for each kind of restoration."""
    top = max(1e-6, *(e for average in averages for row in average.mean for e in _real(row)))
    layers = len(averages[0].mean[0])
    with style():
        figure, panels = blank(
            1.9 + len(averages) * _width(layers),
            1.6 + 0.34 * len(averages[0].classes),
            len(averages),
        )
        for axes, average in zip(panels, averages, strict=True):
            mesh = _map(axes, average.mean, MAPS[average.kind], 0.0, top)
            _label(axes, average.classes if axes is panels[0] else [], restored(average))
            _scale(figure, axes, mesh, "mean indirect effect" if axes is panels[-1] else "")
        head(figure, "Where restoring brings the answer back", _over(averages[0]))
    return figure


def average_lines(averages: Sequence[AverageEffect]) -> Figure:
    """The same as lines over the layers, with 95% bands: one panel for each kind."""
    with style():
        figure, panels = blank(2.2 + 2.9 * len(averages), 3.4, len(averages))
        for axes, average in zip(panels, averages, strict=True):
            if axes is not panels[0]:
                axes.sharey(panels[0])
                axes.tick_params(labelleft=False)
            for number, (name, values) in enumerate(by_token(average)):
                points = [(float(layer), value) for layer, value in enumerate(values)]
                draw_line(axes, points, number, name)
            layer_ticks(axes, len(average.mean[0]))
            subtitle(axes, f"restored: {restored(average)}")
            axes.set_xlabel("layer")
            axes.grid(axis="y")
            axes.axhline(0, color=SOFT, lw=0.8)
        panels[0].set_ylabel("mean indirect effect")
        legend(figure, panels[0])
        head(figure, "Where restoring brings the answer back", _over(averages[0]) + ", 95% bands")
    return figure


def _map(
    axes: Axes, values: Sequence[Sequence[float]], colours: str, low: float, high: float
) -> QuadMesh:
    """A heat map, first row on top; NaN is left blank."""
    high = max(high, low + 1e-6)
    mesh = axes.pcolormesh(
        [list(row) for row in values],
        cmap=colours,
        vmin=low,
        vmax=high,
        edgecolors="white",
        linewidth=0.6,
    )
    axes.invert_yaxis()
    layer_ticks(axes, len(values[0]), 0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    for y, row in enumerate(values if len(values[0]) <= NUMBERED else ()):
        for x, value in enumerate(row):
            if not math.isnan(value):
                dark = value > low + 0.6 * (high - low)
                axes.text(
                    x + 0.5,
                    y + 0.5,
                    _number(value),
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if dark else INK,
                )
    return mesh


def _label(axes: Axes, rows: Sequence[str], title: str) -> None:
    axes.set_yticks([place + 0.5 for place in range(len(rows))], rows)
    subtitle(axes, f"restored: {title}")


def _scale(figure: Figure, axes: Axes, mesh: QuadMesh, name: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label(name, color=SOFT, fontsize=8.5)


def _width(layers: int) -> float:
    """Of a map's panel, in inches."""
    return min(5.0, max(2.4, 0.9 + 0.3 * layers))


def _shown(token: str) -> str:
    """A token on one line; what is invisible becomes visible."""
    seen = "".join(c if c.isprintable() else "↵" for c in token)
    return seen.strip() or "␣"


def _number(value: float) -> str:
    """Two decimals, no zero before the point."""
    return f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1)


def _real(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _over(average: AverageEffect) -> str:
    facts = counted(max(max(row) for row in average.n), "fact")
    return (
        f"{average.model}, mean of {facts}: P is {average.clean:.2f}; {average.corrupted:.2f} is "
        "left where noise hides the subject"
    )
