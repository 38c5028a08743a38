"""Figures: readable without colours, the same bytes each time, whole or not there."""

from __future__ import annotations

import errno
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from errata.errors import StorageError
from errata.jobs.figures import (
    as_svg,
    bar_chart,
    check_figure,
    line_chart,
    save_figure,
    scatter_chart,
)
from errata.measure.metrics import Estimate

SERIES = {
    "ROME": [(1.0, Estimate(0.9, 0.8, 0.95, 20)), (16.0, Estimate(0.5, 0.3, 0.7, 20))],
    "MEMIT & <co>": [(1.0, Estimate(0.8, math.nan, math.nan, 1))],
}
GROUPS = {
    "ES": {"ROME": Estimate(0.9, 0.8, 0.95, 20), "MEMIT": Estimate(0.8, 0.7, 0.9, 20)},
    "PS": {"ROME": Estimate(0.7, math.nan, math.nan, 1)},
}


def lines(**other: Any) -> Figure:
    return line_chart(SERIES, title="Score", x_label="edits so far", y_label="S", **other)


def bars() -> Figure:
    return bar_chart(GROUPS, title="Scores", y_label="share")


def points() -> Figure:
    series = {"a": [(0.0, 1.0), (math.nan, 2.0)], "b": [(1.0, 0.0)]}
    return scatter_chart(series, title="Points", x_label="x", y_label="y")


def drawn(figure: Figure) -> Any:
    """The one panel of a chart."""
    (axes,) = figure.axes
    return axes


def ids(svg: str) -> list[str]:
    return re.findall(r'\bid="([^"]+)"', svg)


@pytest.mark.parametrize("draw", [lines, bars, points])
def test_svg_is_deterministic_and_its_ids_are_its_own(draw: Callable[[], Figure]) -> None:
    svg, again = as_svg(draw()), as_svg(draw())
    assert svg == again
    ElementTree.fromstring(svg)
    assert len(set(ids(svg))) == len(ids(svg))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert used and {a or b for a, b in used} <= set(ids(svg))


def test_figures_share_a_page() -> None:
    found = [ids(as_svg(draw())) for draw in (lines, bars, points)]
    assert len(set().union(*found)) == sum(map(len, found))


def test_text_is_text_and_is_escaped() -> None:
    svg = as_svg(lines())
    said = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert "edits so far" in said and "MEMIT & <co>" in said
    assert svg.count("<title") == 1 and ">Score</title>" in svg


def test_dollars_are_no_formulas_and_missing_glyphs_no_warnings(tmp_path: Path) -> None:
    figure = line_chart({"costs $5 and $7 東京": SERIES["ROME"], "b": SERIES["ROME"]})
    assert "costs $5 and $7 東京" in as_svg(figure)
    save_figure(figure, tmp_path / "x.png")


def test_every_series_differs_without_colours() -> None:
    many = {str(n): SERIES["ROME"] for n in range(7)}
    axes = drawn(line_chart(many))
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in axes.lines}) == 7
    axes = drawn(bar_chart({"ES": {str(n): SERIES["ROME"][0][1] for n in range(7)}}))
    assert len({patch.get_hatch() for patch in axes.patches}) == 7


def test_bands_are_the_intervals_and_nan_is_left_out() -> None:
    series = {"a": [*SERIES["ROME"], (4.0, Estimate(math.nan, math.nan, math.nan, 0))]}
    axes = drawn(line_chart(series))
    assert list(axes.lines[0].get_xdata()) == [1.0, 16.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.3, 0.95)


def test_a_logarithmic_axis_has_its_points_as_ticks_and_room_for_zero() -> None:
    for first in (1.0, 0.0):
        series = {"a": [(first, SERIES["ROME"][0][1]), (64.0, SERIES["ROME"][1][1])]}
        axes = drawn(line_chart(series, log_x=True))
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"{first:g}", "64"]
        assert axes.get_xscale() == ("log" if first else "symlog")


def test_bars_stand_where_there_is_a_value() -> None:
    axes = drawn(bars())
    assert [round(patch.get_height(), 3) for patch in axes.patches] == [0.9, 0.7, 0.8]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ES", "PS"]


def test_points_with_nan_are_left_out() -> None:
    axes = drawn(points())
    assert [len(some.get_offsets()) for some in axes.collections] == [1, 1]


@pytest.mark.parametrize("name", ["x.png", "x.svg", "deep/x.SVG"])
def test_saved_by_suffix_the_same_bytes_each_time(name: str, tmp_path: Path) -> None:
    path = save_figure(lines(), tmp_path / name)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert save_figure(lines(), path).read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"\.png or \.svg"):
        save_figure(lines(), tmp_path / "x.pdf")
    with pytest.raises(StorageError, match=r"\.png or \.svg"):
        check_figure(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.svg"
    path.write_text("before")

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_figure(lines(), path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["x.svg"]


def test_nothing_global_is_touched(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_figure(lines(), tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys\nimport errata.jobs.figures as f\nassert 'matplotlib' not in sys.modules\n"
        "f.as_svg(f.scatter_chart({'a': [(0, 1)]}))\nprint('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_charts_without_a_value_are_still_charts() -> None:
    assert "<svg" in as_svg(line_chart({}, log_x=True))
    assert "<svg" in as_svg(bar_chart({"ES": {"a": Estimate(math.nan, math.nan, math.nan, 0)}}))
    assert "<svg" in as_svg(scatter_chart({"a": []}))
