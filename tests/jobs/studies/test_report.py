"""Charts and reports of a study, from results that are made up, and once from real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errata.errors import ConfigError
from errata.jobs.studies.charts import draw
from errata.jobs.studies.experiment import Experiment, Unit
from errata.jobs.studies.report import save_study_report
from errata.jobs.studies.results import read_results
from errata.jobs.studies.run import run
from errata.jobs.studies.shown import FigureSpec
from errata.jobs.studies.tables import tabulate
from tests.conftest import WORKING
from tests.jobs.made_up import EXPERIMENT, RUNS, answers, results_of, row, runs_of

SHOWN = """
[[table]]
title = "By editor & <batch>"
rows = ["editor", "protocol.batch"]
columns = ["model"]
metrics = ["S", "ES", "PS"]

[[figure]]
title = "By batch"
x = "protocol.batch"
y = ["ES"]
series = ["editor"]
panels = ["model"]
log_x = true

[[claim]]
text = "EMMET keeps up with MEMIT until batches grow."
each = ["model"]
[claim.check]
kind = "equal until"
metric = "ES"
within = 0.1
along = "protocol.batch"
a = { editor = "MEMIT" }
b = { editor = "EMMET" }
"""


# -- charts


def test_a_line_for_each_series_and_the_unedited_model_across() -> None:
    spec = FigureSpec("f", "line", "protocol.batch", ("ES", "PS"), ("editor",), ("model",))
    charts = draw(spec, RUNS)
    assert [chart.title for chart in charts] == [
        f"{model}, {metric}" for model in ("pocket", "pocket-llama") for metric in ("ES", "PS")
    ]
    lines = charts[0].figure.axes[0].lines
    drawn: dict[str, Any] = {str(line.get_label()): line.get_xydata() for line in lines}
    assert set(drawn) == {"MEMIT", "EMMET", "unedited"}
    np.testing.assert_allclose(drawn["MEMIT"], [[1, 100], [4, 100], [16, 100]])
    np.testing.assert_allclose(drawn["EMMET"][[0, 2]], [[1.0, 100.0], [16.0, 57.5]])
    np.testing.assert_allclose(drawn["unedited"], [[1, 0], [16, 0]])


def test_bars_by_relation() -> None:
    where = {"model": "pocket", "protocol.batch": 16}
    spec = FigureSpec("f", "bar", "relation", ("ES",), ("editor",), where=where)
    (chart,) = draw(spec, RUNS)
    axes = chart.figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["capital", "currency"]
    assert len(chart.cells) == 4


def test_dots_of_one_metric_against_another() -> None:
    spec = FigureSpec("f", "scatter", "ES", ("NS",), ("editor",), ("model",), ("protocol.batch",))
    charts = draw(spec, RUNS)
    dots = {
        dots.get_label(): np.asarray(dots.get_offsets())
        for dots in charts[0].figure.axes[0].collections
    }
    assert dots["EMMET"].shape == (3, 2)
    np.testing.assert_allclose(dots["MEMIT"], [[100, 90]] * 3)


def test_a_line_chart_needs_numbers() -> None:
    spec = FigureSpec("f", "line", "editor", ("ES",), ("protocol.batch",), ("model",))
    with pytest.raises(ConfigError, match="editor is (MEMIT|unedited)"):
        draw(spec, RUNS)


def test_a_list_of_one_layer_is_its_number() -> None:
    swept = EXPERIMENT.replace(
        '"protocol.batch" = [1, 4, 16]', '"settings.layers" = [[0], [3], [7]]'
    )
    spec = FigureSpec("f", "line", "settings.layers", ("ES",), ("editor",), ("model",))
    lines = draw(spec, runs_of(swept))[0].figure.axes[0].lines
    drawn: dict[str, Any] = {str(line.get_label()): line.get_xdata() for line in lines}
    assert list(drawn["MEMIT"]) == [0, 3, 7]
    assert list(drawn["unedited"]) == [0, 7]
    several = runs_of(swept.replace("[7]", "[6, 7]"))
    with pytest.raises(ConfigError, match=r"settings.layers is 6"):
        draw(spec, several)


# -- the report


def body(page: str) -> str:
    """A report without the section that machine and clock write."""
    return re.split(r'<section id="machines">|## Machines and times', page)[0]


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    """In whatever order and whenever they were computed; but for the section on that."""
    (tmp_path / "b").mkdir()
    slow = {"created": "2027-01-01T00:00:00+00:00", "seconds": 99.0}
    pages = [
        save_study_report(results_of(tmp_path, EXPERIMENT + SHOWN), tmp_path / "r.html"),
        save_study_report(results_of(tmp_path, EXPERIMENT + SHOWN), tmp_path / "again" / "r.html"),
        save_study_report(
            results_of(
                tmp_path / "b",
                EXPERIMENT + SHOWN,
                measured=lambda unit: row(unit, answers(unit), **slow),
                backwards=True,
            ),
            tmp_path / "b" / "r.html",
        ),
    ]
    texts = [[file.read_text(encoding="utf-8") for file in files] for files in pages]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert [*map(body, texts[0])] == [*map(body, texts[2])]
    pictures = [sorted(page.parent.glob("r-*.svg")) for page, _ in pages]
    assert [p.name for p in pictures[0]] == ["r-figure-1-1.svg", "r-figure-1-2.svg"]
    for one, other in zip(*pictures[:2], strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_every_number_leads_to_its_runs(tmp_path: Path) -> None:
    page, told = save_study_report(results_of(tmp_path, EXPERIMENT + SHOWN), tmp_path / "r.html")
    html, markdown = page.read_text(encoding="utf-8"), told.read_text(encoding="utf-8")
    for found, anchors in (
        (re.findall(r'href="#([^"]+)"', html), re.findall(r'id="([^"]+)"', html)),
        (re.findall(r"\]\(#([^)]+)\)", markdown), re.findall(r'id="([^"]+)"', markdown)),
    ):
        assert len([name for name in found if name.startswith("unit-")]) > 14 * 3
        assert set(found) <= set(anchors)
        assert len(anchors) == len(set(anchors))
    for picture in re.findall(r"\]\((.+?\.svg)\)", markdown):
        assert (tmp_path / picture).read_text(encoding="utf-8").startswith("<?xml")


def test_a_report_tells_numbers_verdicts_and_loads_nothing(tmp_path: Path) -> None:
    page, told = save_study_report(results_of(tmp_path, EXPERIMENT + SHOWN), tmp_path / "r.html")
    html, markdown = page.read_text(encoding="utf-8"), told.read_text(encoding="utf-8")
    for report in (html, markdown):
        assert "no longer at 16" in report and "seen here" in report
        assert "28 of 28" in html
        assert "relaxation" in html
    # The same numbers for all: told once, then pointed at.
    assert markdown.count("relaxation") == 1 and "numbers: those of [" in markdown
    assert "By editor &amp; &lt;batch&gt;" in html
    assert "By editor & &lt;batch>" in markdown
    assert html.count("<svg") == 2
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)


def test_of_numbers_told_before_only_what_is_other_is_told(tmp_path: Path) -> None:
    def measured(unit: Unit) -> Any:
        config = {"relaxation": 0.05 * unit.batch, "rank": 0, "window": unit.batch == 16}
        if unit.label == "EMMET":
            config |= {"rank": unit.batch}
        return row(unit, answers(unit), record={"config": config, "failed": 0})

    _, told = save_study_report(results_of(tmp_path, measured=measured), tmp_path / "r.html")
    markdown = told.read_text(encoding="utf-8")
    assert "but `relaxation` 0.2" in markdown  # of a batch of 4
    assert "but `relaxation` 0.8, `window` true" in markdown
    # Of EMMET's batches of 16 three are other: told anew, once for both models.
    assert markdown.count('"window": true') == 1


def test_what_is_lacking_is_told(tmp_path: Path) -> None:
    def measured(unit: Unit) -> Any:
        if unit.model == "pocket-llama":
            return None
        if unit.batch == 16 and unit.seed == 1:
            return row(unit, (), status="failed", error="SolveError: <singular>")
        return row(unit, answers(unit))

    results = results_of(tmp_path, EXPERIMENT + SHOWN, measured=measured)
    page, told = save_study_report(results, tmp_path / "r.html")
    html, markdown = page.read_text(encoding="utf-8"), told.read_text(encoding="utf-8")
    assert "12 of 28 runs done" in html
    assert "SolveError: &lt;singular&gt;" in html and "SolveError: &lt;singular>" in markdown
    assert "not done yet" in html and "not done yet" in markdown
    assert "undecided" in markdown  # of the model that is not done
    line = next(line for line in markdown.splitlines() if line.startswith("| MEMIT | 16 |"))
    assert "100.0*" in line and "\N{EN DASH}" in line


def test_a_report_of_an_experiment_that_declares_nothing(tmp_path: Path) -> None:
    _, told = save_study_report(results_of(tmp_path), tmp_path / "r.html")
    assert "### All results" in told.read_text(encoding="utf-8")


def test_a_real_run(tmp_path: Path, trained_folder: Path, corpus_file: Path) -> None:
    """From a file over computed results to a report."""
    facts = tmp_path / "facts.jsonl"
    told = '{"prompt": "The capital of {} is", "subject": "%s", "target": "%s", "true": "%s"}\n'
    facts.write_text(told % ("France", "Rome", "Paris") + told % ("Peru", "Cairo", "Lima"))
    file = tmp_path / "real.toml"
    file.write_text(
        f'title = "Real"\nmodels = ["{trained_folder}"]\ndata = "{facts}"\n'
        f'corpus = "{corpus_file}"\n[[editor]]\nmethod = "memit"\n'
        f"settings = {json.dumps(WORKING).replace(':', ' =')}\n"
        '[[editor]]\nmethod = "none"\n'
        '[[table]]\ntitle = "All"\nrows = ["editor"]\nmetrics = ["ES", "EM"]\n',
        encoding="utf-8",
    )
    summary = run(Experiment.load(file), folder=tmp_path)
    assert summary.failed == () and summary.done == 2
    results = read_results(file, tmp_path)
    (table,) = (tabulate(spec, results.runs) for spec in results.shown.tables)
    numbers = {labels[0]: [n.estimate for n in numbers] for labels, numbers in table.lines}
    assert numbers["unedited"][0] is not None and numbers["unedited"][0].mean == 0.0
    assert numbers["MEMIT"][0] is not None and numbers["MEMIT"][0].mean > 0.0
    page, _ = save_study_report(results, tmp_path / "real.html")
    assert "each alone" in page.read_text(encoding="utf-8")
