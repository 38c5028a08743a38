"""Figures: charts that any study draws, and saving them as PNG or SVG.

Every line and bar has a marker, dash or hatch of its own beside its colour (the palette of Okabe
and Ito), so that no reader needs colour vision. A figure's label says in words what it shows; it
becomes the title of the SVG. Nothing here touches pyplot's global state, and matplotlib is imported
only when something is drawn.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.edits.archive import write_whole
from errata.errors import StorageError
from errata.jobs.files import check_writable, make_folder
from errata.measure.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1d1b18", "#6a655c", "#e4dfd4"
"""The colours of text, of what is said beside it, and of rules: those of the report."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "---")

SUFFIXES = (".png", ".svg")

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.grid": False,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "errata",
    "text.color": INK,
    "text.parse_math": False,  # a token with a dollar sign is a token
    "xtick.color": SOFT,
    "xtick.labelsize": 8.5,
    "ytick.color": SOFT,
    "ytick.labelsize": 8.5,
}


@contextmanager
def style() -> Iterator[None]:
    """Whatever is drawn inside the block looks like errata."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        # A script that our font lacks is boxes in a PNG, and right in an SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def blank(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, in inches, with panels side by side; call it inside `style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def line_chart(
    series: Mapping[str, Sequence[tuple[float, Estimate]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
) -> Figure:
    """Lines with their 95% bands.

    Args:
        series: name of a line -> its points (x, estimate), in any order; a point whose mean is NaN
            is left out, one without an interval has no band.
        title: the heading.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        log_x: whether x is drawn on a logarithmic scale; an x of 0 then stands at its left end.
    """
    with style():
        figure, (axes,) = blank(6.8, 3.8)
        for number, (name, points) in enumerate(series.items()):
            draw_line(axes, points, number, name)
        places = sorted({x for points in series.values() for x, _ in points})
        if log_x and places and places[-1] > 0:
            smallest = min(x for x in places if x > 0)
            axes.set_xscale("symlog", linthresh=smallest) if places[0] <= 0 else axes.set_xscale(
                "log"
            )
        if 0 < len(places) <= 12:
            axes.set_xticks(places, [f"{x:g}" for x in places], minor=False)
            axes.minorticks_off()
        _finish(figure, axes, title, x_label, y_label, names=len(series))
    return figure


def draw_line(
    axes: Axes, points: Sequence[tuple[float, Estimate]], number: int, name: str = ""
) -> None:
    """One line with its band, in the colour, dash and marker of its number; none without points."""
    kept = sorted((x, e) for x, e in points if not math.isnan(e.mean))
    if not kept:
        return
    x = [place for place, _ in kept]
    low, high = [e.low for _, e in kept], [e.high for _, e in kept]
    axes.fill_between(x, low, high, color=marked(number)["color"], alpha=0.15, lw=0)
    axes.plot(
        x,
        [e.mean for _, e in kept],
        **marked(number),
        linestyle=DASHES[number % len(DASHES)],
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=name,
        clip_on=False,
    )


def bar_chart(
    groups: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Figure:
    """Bars with their 95% intervals as whiskers, in groups side by side.

    Args:
        groups: name of a group -> name of a bar -> its height; a bar that a group lacks, or whose
            mean is NaN, is left out there.
        title: the heading.
        x_label: what the groups are.
        y_label: what y is, with its unit.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / max(1, len(names))
    with style():
        figure, (axes,) = blank(min(14.0, max(5.0, 2.2 + 0.3 * len(groups) * len(names))), 3.8)
        for number, name in enumerate(names):
            found = [
                (place, bars[name])
                for place, bars in enumerate(groups.values())
                if name in bars and not math.isnan(bars[name].mean)
            ]
            shift = (number - (len(names) - 1) / 2) * width
            axes.bar(
                [place + shift for place, _ in found],
                [e.mean for _, e in found],
                width * 0.92,
                yerr=[
                    [_reach(e.mean, e.low) for _, e in found],
                    [_reach(e.mean, e.high) for _, e in found],
                ],
                color=COLOURS[number % len(COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
                linewidth=0.0,
                error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2},
                label=name,
            )
        crowded = len(groups) > 1 and sum(map(len, groups)) > 60
        axes.set_xticks(
            range(len(groups)),
            list(groups),
            rotation=30 if crowded else 0,
            ha="right" if crowded else "center",
        )
        axes.axhline(0, color=SOFT, lw=0.8)
        _finish(figure, axes, title, x_label, y_label, names=len(names))
    return figure


def scatter_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Figure:
    """Points (x, y) by series; a point that holds NaN is left out."""
    with style():
        figure, (axes,) = blank(5.8, 4.2)
        for number, (name, points) in enumerate(series.items()):
            kept = [(x, y) for x, y in points if not (math.isnan(x) or math.isnan(y))]
            x, y = [x for x, _ in kept], [y for _, y in kept]
            axes.scatter(x, y, s=24, alpha=0.75, linewidths=0, label=name, **marked(number))
        axes.grid(axis="x")
        _finish(figure, axes, title, x_label, y_label, names=len(series))
    return figure


def marked(number: int) -> dict[str, Any]:
    """Colour and marker of a series, by its number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _reach(mean: float, end: float) -> float:
    return 0.0 if math.isnan(end) else abs(end - mean)


def _finish(
    figure: Figure, axes: Axes, title: str, x_label: str, y_label: str, *, names: int
) -> None:
    axes.grid(axis="y")
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if names > 1:
        legend(figure, axes)
    figure.set_label(title)


def legend(figure: Figure, axes: Axes) -> None:
    """Name the lines beside the chart, where no point can hide them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", handlelength=2.6)


def head(figure: Figure, title: str, said: str) -> None:
    """The figure's heading with a line under it; both become its label."""
    width = figure.get_size_inches()[0]
    shown = clipped(title, int(9.5 * width))
    figure.suptitle(shown, x=0.008, ha="left", fontsize=11.5, fontweight="bold")
    shown = clipped(said, int(15 * width))
    figure.supxlabel(shown, x=0.008, ha="left", fontsize=8.5, color=SOFT)
    figure.set_label(f"{title}: {said}")


def subtitle(axes: Axes, text: str) -> None:
    """Head one panel."""
    axes.set_title(text, fontsize=9.5, fontweight="normal")


def layer_ticks(axes: Axes, layers: int, shift: float = 0.0) -> None:
    """Number the layers, a dozen of them at most."""
    step = max(1, math.ceil(layers / 12))
    axes.set_xticks(
        [layer + shift for layer in range(0, layers, step)], map(str, range(0, layers, step))
    )


def clipped(text: str, width: int) -> str:
    """The text, cut off where it is too long."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def counted(count: int, noun: str) -> str:
    """`1 fact`, `2 facts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def check_figure(path: Path | str) -> None:
    """Find out before a long run that its figure could not be saved.

    Raises:
        StorageError: the suffix names no kind of picture, or the place cannot be written.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise StorageError(
            f"cannot write the figure {path}: its name must end in {' or '.join(SUFFIXES)}."
        )
    check_writable(path)


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a figure as PNG or SVG, as the suffix says, whole or not at all.

    The same figure gives the same bytes.

    Raises:
        StorageError: the suffix is another, or the file cannot be written.
    """
    path = Path(path)
    check_figure(path)
    make_folder(path.parent)
    if path.suffix.lower() == ".svg":
        data = ('<?xml version="1.0" encoding="utf-8"?>\n' + as_svg(figure)).encode("utf-8")
    else:
        data = _drawn(figure, "png", {"Software": None, "Title": str(figure.get_label())})
    write_whole(path, data)
    return path


def as_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element for a web page.

    Text stays text; its ids begin with a hash of the picture, so that several figures share a
    page; what it shows is said in its title.
    """
    text = _drawn(figure, "svg", dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    mark = "f" + hashlib.sha256(text.encode()).hexdigest()[:10]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", text)
    label = html.escape(str(figure.get_label()))
    opening, rest = text.split(">", 1)
    return (
        f'{opening} role="img" aria-labelledby="{mark}">\n <title id="{mark}">{label}</title>{rest}'
    )


def _drawn(figure: Figure, kind: str, metadata: Mapping[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=kind, dpi=200, metadata=dict(metadata))
    return buffer.getvalue()
