"""What is pooled, and what tables say of it, from results that are made up."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import pytest

from errata.errors import ConfigError, StorageError
from errata.jobs.studies.cells import cells, text
from errata.jobs.studies.declared import declared
from errata.jobs.studies.differences import difference
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.results import read_results
from errata.jobs.studies.shown import Shown, TableSpec
from errata.jobs.studies.tables import overview, tabulate
from errata.measure.metrics import interval
from tests.jobs.made_up import (
    EXPERIMENT,
    RUNS,
    case,
    cell,
    point,
    results_of,
    row,
    runs_of,
    saved,
    two_seeds,
)

# -- the sections of the file


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("table", {"title": "t", "rows": ["modle"], "metrics": ["S"]}, "Did you mean 'model'"),
        ("table", {"title": "t", "rows": ["model"], "metrics": ["SE"]}, "`metrics`: there is no"),
        ("table", {"title": "t", "rows": ["model"]}, "needs a list of names as `metrics`"),
        ("table", {"title": "t", "row": ["model"]}, "no field 'row'.*Did you mean 'rows'"),
        ("table", {"rows": ["model"], "metrics": ["S"]}, "needs `title`"),
        (
            "table",
            {"title": "t", "rows": ["model"], "metrics": ["S"], "where": {"bach": 1}},
            "`where`: there is no 'bach'",
        ),
        ("figure", {"title": "f", "x": "model", "y": "S", "kind": "pie"}, "line, bar, scatter"),
        ("figure", {"title": "f", "y": "S"}, "needs one name as `x`"),
        ("figure", {"title": "f", "x": "model", "y": "S", "points": ["model"]}, "only kind"),
        ("figure", {"title": "f", "x": "PS", "y": "S", "kind": "scatter"}, "`points`"),
        (
            "figure",
            {"title": "f", "x": "model", "y": "S", "kind": "bar", "log_x": True},
            'only kind = "line"',
        ),
        ("claim", {"text": "c"}, "`check` needs `kind`"),
        ("claim", {"text": "c", "check": {"metric": "S"}}, "`check` needs `kind`"),
        ("claim", {"text": "c", "check": {"kind": "eqal"}}, "Did you mean 'equal'"),
        (
            "claim",
            {"text": "c", "check": {"kind": "equal", "metric": "S", "a": {}, "b": {}}},
            "needs `within`",
        ),
        (
            "claim",
            {"text": "c", "check": {"kind": "order", "metric": "S", "of": [{"model": "a"}]}},
            "at least two",
        ),
        (
            "claim",
            {
                "text": "c",
                "check": {"kind": "equal", "metric": "S", "a": {}, "b": {}, "within": -1},
            },
            "number from 0",
        ),
    ],
)
def test_a_typo_in_a_section_is_refused(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{section} 1.*{message}"):
        Shown.read({section: [values]})


def test_unquoted_dots_name_the_same_field() -> None:
    values = {"title": "t", "rows": ["model"], "metrics": ["S"]}
    nested = TableSpec.read({**values, "where": {"protocol": {"batch": 4}}}, "table 1")
    assert nested.where == {"protocol.batch": 4}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            '[[table]]\ntitle = "t"\nrows = ["editor"]\nmetrics = ["S"]',
            "table 1: .*differ in batch",
        ),
        ('[[figure]]\ntitle = "f"\nx = "protocol.batch"\ny = "S"', "figure 1: .*differ in label"),
        (
            '[[claim]]\ntext = "c"\n[claim.check]\nkind = "greater"\nmetric = "S"\n'
            'a = { editor = "MEMTI" }\nb = { editor = "EMMET" }',
            "claim 1: nothing in this experiment has MEMTI",
        ),
    ],
)
def test_what_does_not_fit_the_experiment_is_found_before_it_runs(
    tmp_path: Path, section: str, message: str
) -> None:
    file = tmp_path / "made-up.toml"
    file.write_text(f"{EXPERIMENT}\n{section}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"made-up.toml: {message}"):
        declared(Experiment.load(file))


# -- pooling


def test_a_case_in_two_runs_counts_once() -> None:
    found = two_seeds(
        [case(1, ES=1.0), case(2, ES=1.0), case(3, ES=0.0)], [case(1, ES=0.0), case(4, ES=1.0)]
    ).summary["ES"]
    assert found == interval([0.5, 1.0, 0.0, 1.0], within=(0.0, 1.0))


def test_yes_or_no_keeps_its_interval_where_seeds_agree() -> None:
    found = two_seeds([case(1, ES=1.0), case(2, ES=1.0)], [case(1, ES=1.0), case(3, ES=1.0)])
    assert found.summary["ES"] == interval([1.0, 1.0, 1.0])
    assert found.summary["ES"].low < 0.5  # Wilson's: three of three do not prove much


def test_s_is_the_harmonic_mean_of_the_pooled_means() -> None:
    first = [case(1, ES=1.0, PS=0.5, NS=0.8), case(2, ES=1.0, PS=1.0, NS=0.6)]
    second = [case(1, ES=0.0, PS=0.5, NS=0.4)]
    found = two_seeds(first, second).summary
    assert found["S"].mean == pytest.approx(harmonic_mean([0.75, 0.75, 0.6]))
    assert found["S"].low <= found["S"].mean <= found["S"].high


def test_a_metric_that_few_cases_have_is_over_those() -> None:
    first = [case(1, ES=1.0, GE=5.0), case(2, ES=1.0)]
    found = two_seeds(first, [case(3, ES=1.0, GE=7.0)]).summary["GE"]
    assert (found.mean, found.n) == (6.0, 2)


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged() -> None:
    with pytest.raises(ConfigError, match="editor = MEMIT.*also differ in batch, model"):
        cells(RUNS, ("editor",), {"editor": "MEMIT"})


def test_cells_come_in_the_order_of_the_experiment() -> None:
    found = list(cells(RUNS, ("protocol.batch", "editor"), {"model": "pocket"}))
    assert found[:4] == [(1, "MEMIT"), (1, "EMMET"), (4, "MEMIT"), (4, "EMMET")]
    assert found[-1] == (None, "unedited")


def test_relations_divide_the_cases() -> None:
    where = {"model": "pocket", "protocol.batch": 16, "editor": "EMMET"}
    found = cells(RUNS, ("relation",), where)
    assert list(found) == [("capital",), ("currency",)]
    assert sum(part.summary["ES"].n for part in found.values()) == cell().summary["ES"].n == 40
    only = cells(RUNS, (), {**where, "relation": ["currency"]})[()]
    assert only.summary == found["currency",].summary


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\N{EN DASH}"),
        ((0, 1, 2), "0-2"),
        ((0, 1), "0, 1"),
        ((0, 2, 4), "0, 2, 4"),
        (True, "yes"),
        (1.0, "1"),
        ("x", "x"),
    ],
)
def test_values_are_for_people(value: Any, shown: str) -> None:
    assert text(value) == shown


# -- tables


def test_a_table_with_columns() -> None:
    spec = TableSpec("t", ("editor", "protocol.batch"), ("ES", "GE"), ("model",))
    table = tabulate(spec, RUNS)
    assert table.fields == ("editor", "batch")
    assert table.groups == (("pocket", 2), ("pocket-llama", 2))
    assert table.metrics == ("ES", "GE", "ES", "GE")
    assert [labels for labels, _ in table.lines] == [
        *(("MEMIT", batch) for batch in ("1", "4", "16")),
        *(("EMMET", batch) for batch in ("1", "4", "16")),
        ("unedited", "\N{EN DASH}"),
    ]
    labels, numbers = table.lines[5]
    assert labels == ("EMMET", "16")
    assert numbers[0].estimate == pytest.approx(
        tuple(100 * x for x in cell("EMMET", 16).summary["ES"][:3]) + (40,)
    )
    assert numbers[1].estimate is None  # no free text was written


def test_the_overview_names_what_varies() -> None:
    assert overview(RUNS).rows == ("model", "editor", "protocol.batch")
    assert overview(RUNS).metrics == ("S", "ES", "PS", "NS")
    alone = overview(RUNS, where={"protocol.batch": 4, "editor": "MEMIT"})
    assert alone.rows == ("model", "editor")
    with pytest.raises(ConfigError, match="nothing here has batch 5"):
        overview(RUNS, where={"protocol.batch": 5})
    with pytest.raises(ConfigError, match="metrics: there is no 'EZ'"):
        overview(RUNS, ["EZ"])


def test_the_overview_shows_what_was_measured() -> None:
    perplexity = {"rewrite.perplexity": 2.0, "neighbours.perplexity": 1.5}
    runs = runs_of(EXPERIMENT, lambda unit: [{"case_id": "0", "metrics": perplexity}])
    assert overview(runs).metrics == tuple(perplexity)
    assert overview(runs_of(EXPERIMENT, lambda unit: [])).metrics == ("S", "ES", "PS", "NS")


def test_results_are_of_the_experiment_as_it_is_now(tmp_path: Path) -> None:
    """Rows of units that were dropped are left aside; of two of one unit the later counts."""
    results_of(tmp_path)
    old = [unit for unit in Experiment.load(tmp_path / "made-up.toml").units() if unit.batch == 4]
    again = row(old[0], [case(1, ES=0.25)], created="2027-01-01T00:00:00+00:00")
    again = type(again)(**{**vars(again), "key": "of other code"})
    file = saved(
        tmp_path,
        EXPERIMENT.replace("[1, 4, 16]", "[4]"),
        measured=lambda unit: again if unit == old[0] else None,
    )
    found = read_results(file, tmp_path)
    assert {run.unit["batch"] for run in found.runs if run.unit["label"] != "unedited"} == {4}
    assert len(found.rows) == len(found.runs) == 12
    assert found.runs[0].row is not None and found.runs[0].row.key == "of other code"


def test_an_experiment_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    file = tmp_path / "made-up.toml"
    file.write_text(EXPERIMENT, encoding="utf-8")
    with pytest.raises(StorageError, match=r"no results of made-up yet.*\n?.*errata run"):
        read_results(file, tmp_path)


# -- streams

STREAM = EXPERIMENT.replace('kind = "batch"', 'kind = "sequential"').replace("[1, 4, 16]", "[10]")


def streams() -> list[Any]:
    runs = runs_of(STREAM)
    for number, one in enumerate(runs):
        if one.row is not None and one.unit["label"] != "unedited":
            share = 1.0 - 0.1 * one.unit["seed"] - 0.3 * (one.unit["label"] == "EMMET")
            points = (point(1, ES=share), point(3, ES=share / 2, retention=0.5))
            immediate = [
                {**c, "metrics": c["metrics"] | {"immediate.ES": 1.0}} for c in one.row.cases
            ]
            values = {**vars(one.row), "points": points, "cases": tuple(immediate)}
            runs[number] = type(one)(one.unit, type(one.row)(**values))
    return runs


def test_points_of_a_stream_are_put_together_over_seeds() -> None:
    found = cells(streams(), ("edits",), {"editor": "MEMIT", "model": "pocket"})
    assert list(found) == [(10,), (30,)]  # facts, not batches
    estimate = found[10,].summary["ES"]
    half = math.hypot(0.1, 0.1) / 2
    assert estimate == pytest.approx((0.95, 0.95 - half, 0.95 + half, 20))
    assert found[30,].summary["retention"].mean == 0.5


def test_the_end_of_a_stream_is_in_its_cases() -> None:
    found = cells(streams(), (), {"editor": "MEMIT", "model": "pocket"})[()].summary
    assert found["immediate.ES"].mean == 1.0
    assert found["ES"] == cell("MEMIT", 4).summary["ES"]


def test_points_differ_without_cases() -> None:
    runs = streams()
    at = {"model": "pocket", "edits": 10}
    first, second = (cells(runs, (), {"editor": name, **at})[()] for name in ("MEMIT", "EMMET"))
    found = difference(first, second, "ES")
    assert found is not None and found.p is None
    assert found.estimate[:3] == pytest.approx((0.3, 0.2, 0.4))


def test_stages_are_not_averaged() -> None:
    with pytest.raises(ConfigError, match="also differ in edits"):
        cells(streams(), (), {"editor": "MEMIT", "model": "pocket", "edits": [10, 30]})
