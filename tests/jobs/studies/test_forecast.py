"""What an experiment will cost: counted exactly, measured where the model is, else reckoned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from errata.errors import ConfigError, RequestFileError
from errata.jobs.studies import forecast
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.forecast import plan
from errata.jobs.studies.run import run
from errata.jobs.studies.units import UNEDITED, Unit
from errata.jobs.studies.workload import Rates, Work, total, work_of
from tests.jobs.working import experiment

PLAIN = Unit("pocket", "MEMIT", "memit")
SHAPE = "layers = 48\nd_model = 1600\nd_ff = 6400\nvocabulary = 50257\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("fields", "work"),
    [
        ({}, Work(10, 10, 10, targets=10)),
        ({"protocol": "batch", "batch": 4}, Work(10, 3, 10, targets=10)),
        ({"method": UNEDITED}, Work(0, 0, 10)),
        ({"generation": True, "generation_count": 3}, Work(10, 10, 10, 0, 3, 10)),
        # After 4, 8 and 10 facts: these, and each right after its own batch.
        ({"protocol": "sequential", "batch": 4}, Work(10, 3, 10 + 4 + 8 + 10, 3, targets=10)),
        (
            {"protocol": "sequential", "batch": 4, "every": 2},
            Work(10, 3, 10 + 8 + 10, 2, targets=10),
        ),
        ({"protocol": "sequential", "batch": 5, "every": 2}, Work(10, 2, 10 + 10, 1, targets=10)),
    ],
)
def test_work_is_counted(fields: dict[str, object], work: Work) -> None:
    assert work_of(replace(PLAIN, **fields), 10) == work  # type: ignore[arg-type]


def test_a_plan_counts_what_is_not_done_yet(tmp_path: Path, trained_folder: Path) -> None:
    mine = Experiment.load(experiment(tmp_path, trained_folder))
    found = plan(mine)
    (cost,) = found.costs
    assert (found.finished, cost.units, cost.how) == (0, 2, "measured")
    assert cost.work == Work(8, 8, 8, targets=4)  # both methods take the same
    assert 0 < cost.seconds == found.seconds < 600
    assert cost.nbytes > 10_000_000
    run(mine, only="MEMIT")
    (later,) = plan(mine).costs
    assert (plan(mine).finished, later.work) == (1, Work(4, 4, 4, targets=4))
    run(mine)
    assert not plan(mine).units and not plan(mine).costs
    assert (tmp_path / "results").exists() and not (tmp_path / "other").exists()
    assert plan(mine, folder="other").finished == 0
    assert not (tmp_path / "other").exists()  # nothing is left by asking


def test_targets_are_counted_once_where_units_share_them(tmp_path: Path) -> None:
    rows = 'models = ["pocket"]\ncount = 8\n[protocol]\nkind = "batch"\n'
    sweep = '[sweep]\n"protocol.batch" = [1, 4]\n'
    editors = (
        '[[editor]]\nmethod = "memit"\n'
        '[[editor]]\nmethod = "emmet"\nsettings = { layers = [2] }\n'  # MEMIT's last, too
        '[[editor]]\nmethod = "rome"\n'  # elsewhere; and batches one by one on the edited model
    )
    (tmp_path / "mine.toml").write_text(rows + sweep + editors, encoding="utf-8")
    units = Experiment.load(tmp_path / "mine.toml").units()
    assert total(units).targets == 8 + 8 + 8
    assert total(units).facts == 6 * 8


def test_more_work_costs_more(tmp_path: Path, trained_folder: Path) -> None:
    mine = Experiment.load(experiment(tmp_path, trained_folder))
    rates = Rates(target=2.0, edit=0.25, scored=0.5, point=3.0, text=10.0)
    assert rates.of(Work(9, 1, 4, 2, 1, 3)) == 6.0 + 0.25 + 2.0 + 6.0 + 10.0
    (cost,) = plan(replace(mine, seeds=tuple(range(50)))).costs
    assert cost.work == Work(400, 400, 400, targets=200)


def test_a_model_that_is_not_here_is_reckoned_from_its_shape(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "STAND_IN", str(trained_folder))
    monkeypatch.setattr(forecast, "SAMPLE", 1)
    monkeypatch.setattr(forecast, "_speed", lambda: 1e11)
    file = experiment(tmp_path, trained_folder)
    text = file.read_text(encoding="utf-8").replace(str(trained_folder), "some/model", 1)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)'some/model' is not on this machine.*d_model"):
        plan(Experiment.load(file))
    file.write_text(text + '\n[model."some/model"]\n' + SHAPE, encoding="utf-8")
    (cost,) = plan(Experiment.load(file)).costs
    assert (cost.how, cost.units, cost.work) == ("estimated", 2, Work(8, 8, 8, targets=4))
    # GPT-2 XL: 1.6 billion parameters in float32, and two moments with their factors.
    assert 4 * 1.5e9 < cost.nbytes < 4 * 1.6e9 + 2 * 12 * 6400**2 + 1e9
    larger = text + '\n[model."some/model"]\n' + SHAPE.replace("1600", "3200")
    file.write_text(larger.replace("6400", "12800"), encoding="utf-8")
    (other,) = plan(Experiment.load(file)).costs
    assert 3 < other.seconds / cost.seconds < 5  # four times the weights


def test_neither_model_nor_data_need_to_be_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Unit] = []

    def rates(unit: Unit, *_: object) -> Rates:
        seen.append(unit)
        return Rates(1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(forecast, "_rates", rates)
    file = tmp_path / "mine.toml"
    text = 'models = ["some/model"]\ndata = "absent.json"\ncount = 9\n[[editor]]\nmethod = "memit"'
    layers = "\nsettings = { layers = [24, 47] }\n"
    file.write_text(text + layers + '[model."some/model"]\n' + SHAPE, encoding="utf-8")
    found = plan(Experiment.load(file))
    assert found.absent == ("absent.json",) and found.costs[0].work == Work(9, 9, 9, targets=9)
    assert (seen[0].model, seen[0].data) == ("pocket", "pocket")
    assert seen[0].settings["layers"] == [4, 7]  # of eight blocks


def test_data_that_is_not_there_is_named(tmp_path: Path, trained_folder: Path) -> None:
    mine = Experiment.load(experiment(tmp_path, trained_folder))
    with pytest.raises(RequestFileError, match=r"no file absent\.json"):
        plan(replace(mine, base=replace(mine.base, data="absent.json")))
