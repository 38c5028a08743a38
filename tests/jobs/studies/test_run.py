"""Running an experiment: what is kept, skipped, resumed, shared and told of failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ConfigError, DatasetError, ModelLoadError, SolveError, StorageError
from errata.jobs.studies import run as studies
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.protocols import Outcome
from errata.jobs.studies.rows import Row
from errata.jobs.studies.run import chosen, run
from errata.jobs.studies.store import Store
from errata.measure.metrics import Estimate
from tests.jobs.working import experiment, write_cases

SWEEP = '[protocol]\nkind = "batch"\n[sweep]\n"protocol.batch" = [1, 2]\n'
FOLDER = "results"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are left in a folder of the test's own, and no other study is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mine(tmp_path: Path, trained_folder: Path) -> Experiment:
    return Experiment.load(experiment(tmp_path, trained_folder, SWEEP))


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed, instead of computing it."""
    names: list[str] = []

    def quick(unit: Any, **_: Any) -> Outcome:
        names.append(str(unit))
        return Outcome({"ES": Estimate(1.0, 0.5, 1.0, 4)}, ({"case_id": "1", "metrics": {}},))

    monkeypatch.setattr(studies, "perform", quick)
    return names


def rows(path: Path | None = None) -> list[Row]:
    with Store(path or Path(FOLDER) / "mine.sqlite", read_only=True) as store:
        return store.rows(cases=True)


def test_every_unit_gives_a_row_and_none_is_computed_twice(mine: Experiment) -> None:
    first = run(mine)
    assert (first.done, first.skipped, first.failed) == (4, 0, ())
    kept = rows()
    assert [row.unit for row in kept] == sorted(
        (unit.to_dict() for unit in mine.units()), key=lambda u: (u["label"], u["batch"])
    )
    assert all(row.metrics["ES"].n == len(row.cases) == 4 for row in kept)
    assert all(set(row.record["hashes"]) == {"model", "cases", "text", "code"} for row in kept)
    again = run(mine)
    assert (again.done, again.skipped) == (0, 4)
    assert rows() == kept


def test_what_changes_is_computed_and_the_rest_is_not(
    mine: Experiment, tmp_path: Path, performed: list[str]
) -> None:
    run(mine)
    performed.clear()
    more = replace(mine, sweep={"protocol.batch": (1, 2, 4)})
    assert run(more).done == 2 and all("batches of 4" in name for name in performed)
    performed.clear()
    path = tmp_path / "cases.json"
    path.write_text(path.read_text(encoding="utf-8").replace("river", "stream"), encoding="utf-8")
    assert run(mine).done == 4


def test_a_label_is_a_name_and_no_reason_to_compute(mine: Experiment, performed: list[str]) -> None:
    run(mine)
    performed.clear()
    called = replace(mine, editors=tuple(replace(e, label=f"my {e.label}") for e in mine.editors))
    assert run(called).skipped == 4 and not performed
    assert {row.unit["label"] for row in rows()} == {"my MEMIT", "my EMMET"}


def test_another_study_shares_what_it_has_computed(mine: Experiment, performed: list[str]) -> None:
    run(mine)
    performed.clear()
    other = replace(mine, name="other", seeds=(0, 1))
    result = run(other)
    assert (result.adopted, result.done, result.skipped) == (4, 4, 0)
    assert all("seed 1" in name for name in performed)
    assert {row.study for row in rows(Path(FOLDER) / "other.sqlite")} == {"other"}
    assert run(other).skipped == 8


def test_a_unit_that_fails_is_told_and_tried_again(
    mine: Experiment, monkeypatch: pytest.MonkeyPatch, performed: list[str]
) -> None:
    quick: Callable[..., Outcome] = vars(studies)["perform"]

    def failing(unit: Any, **options: Any) -> Outcome:
        if unit.label == "EMMET" and unit.batch == 1:
            raise SolveError("the keys are dependent.")
        if unit.label == "EMMET":
            raise KeyError("a bug")
        return quick(unit, **options)

    monkeypatch.setattr(studies, "perform", failing)
    result = run(mine)
    assert result.done == 2
    (first, why), (second, trace) = result.failed
    assert "EMMET" in first and why == "the keys are dependent."
    assert "EMMET" in second and "Traceback" in trace and "a bug" in trace
    assert sorted(row.status for row in rows()) == ["done", "done", "failed", "failed"]
    monkeypatch.setattr(studies, "perform", quick)
    again = run(mine)
    assert (again.done, again.skipped, again.failed) == (2, 2, ())
    assert {row.status for row in rows()} == {"done"}


def test_what_another_process_is_at_is_left_to_it(mine: Experiment, performed: list[str]) -> None:
    (key, *_) = studies.keyed(mine.units())
    with Store(Path(FOLDER) / "mine.sqlite") as other:
        assert other.claim(key)
        result = run(mine)
    assert (result.done, result.elsewhere) == (3, 1)
    assert run(mine).done == 1


def test_an_interrupt_keeps_what_is_done_and_lets_go_of_the_rest(
    mine: Experiment, monkeypatch: pytest.MonkeyPatch, performed: list[str]
) -> None:
    quick: Callable[..., Outcome] = vars(studies)["perform"]

    def interrupted(unit: Any, **options: Any) -> Outcome:
        if len(performed) == 2:
            raise KeyboardInterrupt
        return quick(unit, **options)

    monkeypatch.setattr(studies, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(mine)
    assert len(rows()) == 2
    with Store(Path(FOLDER) / "mine.sqlite", read_only=True) as store:
        assert not store.claims()


def test_progress_names_the_unit_and_counts_them(mine: Experiment, performed: list[str]) -> None:
    heard: list[tuple[str, int, int]] = []
    run(mine, progress=lambda *what: heard.append(what))
    names = [str(unit) for unit in mine.units()]
    assert [stage for stage, done, _ in heard if stage in names and done == 0] == names
    assert ("units", 4, 4) in heard


def test_only_some(mine: Experiment, performed: list[str]) -> None:
    assert run(mine, only="emmet on").done == 2
    assert all("EMMET" in name for name in performed)
    with pytest.raises(ConfigError, match=r"no unit has 'rome'.*\n  MEMIT on"):
        chosen(mine, "rome")


def test_workers_give_the_rows_of_the_loop(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Experiment.load(experiment(tmp_path, trained_folder))
    run(mine)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "another"))  # where nothing is known
    apart = run(mine, folder=tmp_path / "apart", on="processes", workers=1)
    assert (apart.done, apart.adopted) == (2, 0)
    for here, there in zip(rows(), rows(tmp_path / "apart" / "mine.sqlite"), strict=True):
        assert here.unit == there.unit
        for name, estimate in here.metrics.items():
            assert there.metrics[name].mean == pytest.approx(estimate.mean, abs=1e-3)


def test_the_same_work_under_two_names_is_refused(tmp_path: Path, trained_folder: Path) -> None:
    mine = Experiment.load(experiment(tmp_path, trained_folder))
    twice = replace(mine, editors=(mine.editors[0], replace(mine.editors[0], label="again")))
    with pytest.raises(ConfigError, match=r"same work under two names.*\n  MEMIT on.*\n  again on"):
        run(twice)


def test_bad_input_is_refused_before_anything_is_computed(
    tmp_path: Path, trained_folder: Path, performed: list[str]
) -> None:
    mine = Experiment.load(experiment(tmp_path, trained_folder))
    with pytest.raises(ModelLoadError, match="Did you mean 'pocket'"):
        run(replace(mine, models=("poket",)))
    with pytest.raises(DatasetError, match="has 8 cases.*9 were asked"):
        run(replace(mine, base=replace(mine.base, count=9)))
    with pytest.raises(ConfigError, match="table 1.*no field 'rwos'"):
        run(replace(mine, reported={"table": [{"rwos": ["model"]}], "figure": [], "claim": []}))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the folder"):
        run(mine, folder=tmp_path / "file" / "results")
    write_cases(tmp_path / "cases.json").write_text("{", encoding="utf-8")
    with pytest.raises(DatasetError, match="not valid JSON"):
        run(mine)
    assert not performed
