"""Editors that must learn first, in studies: from what, once, kept, shared, gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errata.editors.fitted import load_editor
from errata.editors.hypernet.mend import Mend
from errata.errors import ConfigError, DatasetError, FitError
from errata.jobs.cases import sample_cases
from errata.jobs.studies.cells import Cell, Run
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.fits import fit_file, training_cases
from errata.jobs.studies.forecast import plan
from errata.jobs.studies.keys import fit_key
from errata.jobs.studies.rows import Row
from errata.jobs.studies.run import keyed, run
from errata.jobs.studies.store import Store
from errata.jobs.studies.units import Unit, checked
from errata.lm.load import LanguageModel
from tests.jobs.working import write_cases, write_corpus

POCKET = checked(Unit("pocket", "MEND", "mend", count=50, fit={"count": 300}))
QUICK = (
    'settings = { "network.rank" = 32, "network.learning_rate" = 0.1, "training.steps" = 4, '
    '"training.validate_every" = 2, "layers" = [1] }\n'
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cases each fit that was made has learnt from."""
    made: list[int] = []
    fit: Callable[..., Any] = Mend.fit

    def counted(self: Mend, lm: LanguageModel, cases: Any, **more: Any) -> Any:
        made.append(len(cases.train))
        return fit(self, lm, cases, **more)

    monkeypatch.setattr(Mend, "fit", counted)
    return made


def mine(folder: Path, trained: Path, *more: str, fit: str = "count = 4", name: str = "") -> Path:
    """A study of MEND, each edit alone and in batches of 2."""
    cases, corpus = write_cases(folder / "cases.json"), write_corpus(folder / "corpus.txt")
    head = f"models = ['{trained}']\ndata = '{cases}'\ncorpus = '{corpus}'\ncount = 3\n"
    kinds = '[sweep]\n"protocol.kind" = ["single", "batch"]\n"protocol.batch" = [2]\n'
    editor = f'[[editor]]\nmethod = "mend"\n{QUICK}[editor.fit]\n{fit}\n'
    path = folder / f"{name or 'mine'}.toml"
    path.write_text("\n".join([head, *more, kinds, editor]), encoding="utf-8")
    return path


def rows(name: str = "mine", folder: Path = Path("results")) -> list[Row]:
    with Store(folder / f"{name}.sqlite", read_only=True) as store:
        return store.rows(cases=True)


def test_nothing_that_is_evaluated_is_learnt_from() -> None:
    for unit in (POCKET, replace(POCKET, seed=1), replace(POCKET, count=200, fit={"count": 300})):
        unit = checked(unit)
        found = training_cases(unit)
        learnt = [*found.train, *found.validation]
        evaluated = sample_cases("pocket", unit.count, unit.seed)
        assert len(learnt) == 300 == len(set(learnt)) and len(found.validation) == 30
        assert {c.case_id for c in learnt}.isdisjoint(c.case_id for c in evaluated)
        prompts = {p for c in evaluated for p in (c.request.text, *c.paraphrases)}
        assert prompts.isdisjoint(p for c in learnt for p in (c.request.text, *c.paraphrases))


def test_cases_of_any_wording_are_known_by_their_fact() -> None:
    """Another source that words the same facts in another way gives none of them away."""
    found = training_cases(checked(replace(POCKET, fit={"data": "pocket-any-wording"})))
    facts = {(c.request.subject, c.relation) for c in (*found.train, *found.validation)}
    evaluated = sample_cases("pocket", 50, 0)
    assert facts.isdisjoint((c.request.subject, c.relation) for c in evaluated)


def test_a_sweep_over_the_count_shares_what_is_clear_of_the_largest() -> None:
    small, large = (
        training_cases(checked(replace(POCKET, count=count, fit={"count": 300, "clear_of": 200})))
        for count in (50, 200)
    )
    assert small == large
    for count in (50, None):
        with pytest.raises(ConfigError, match="clear_of = 40 it would learn from some of the"):
            checked(replace(POCKET, count=count, fit={"clear_of": 40}))


def test_there_may_be_too_little_to_learn_from() -> None:
    with pytest.raises(DatasetError, match=r"'MEND' cannot learn from 5000 cases: pocket has 844"):
        training_cases(checked(replace(POCKET, fit={"count": 5000})))
    with pytest.raises(DatasetError, match="pocket has 0"):
        training_cases(checked(replace(POCKET, count=None, fit={})))


def test_a_fits_key_is_of_all_that_it_depends_on() -> None:
    cases = training_cases(POCKET)
    key = fit_key(POCKET, model="m", cases=cases)
    # Neither names, nor what the editor is used for, nor settings that say the default.
    same: list[dict[str, Any]] = [
        {"label": "other"},
        {"protocol": "batch", "batch": 4},
        {"metrics": ("free",)},
        {"settings": {"training": {"patience": 600}}},
    ]
    for fields in same:
        assert fit_key(replace(POCKET, **fields), model="m", cases=cases) == key
    other: list[dict[str, Any]] = [
        {"seed": 1},
        {"method": "salem"},
        {"settings": {"training": {"steps": 20}}},
        {"dtype": "bfloat16"},
    ]
    keys = {fit_key(replace(POCKET, **fields), model="m", cases=cases) for fields in other}
    fewer = replace(cases, train=cases.train[1:])
    keys |= {fit_key(POCKET, model="n", cases=cases), fit_key(POCKET, model="m", cases=fewer)}
    assert len(keys | {key}) == 7


def test_one_fit_serves_all_units_and_every_study(
    tmp_path: Path, trained_folder: Path, fits: list[int]
) -> None:
    experiment = Experiment.load(mine(tmp_path, trained_folder))
    assert plan(experiment).fits == 1
    fits.clear()
    result = run(experiment)
    assert (result.done, result.failed, fits) == (2, (), [3])
    (batch, single) = rows()
    assert batch.record["hashes"]["fit"] == single.record["hashes"]["fit"]
    assert plan(experiment).fits == 0
    again = mine(tmp_path, trained_folder, 'metrics = ["teacher-forced"]', name="other")
    assert plan(Experiment.load(again)).fits == 0
    fits.clear()  # a plan begins some, to measure a step
    assert run(Experiment.load(again)).done == 2 and run(experiment).skipped == 2
    assert not fits
    # Other cases to learn from are another fit, and other results.
    run(Experiment.load(mine(tmp_path, trained_folder, fit="count = 5", name="more")))
    assert fits == [4] and len({row.key for row in (*rows(), *rows("more"))}) == 4


def test_a_record_tells_of_the_fit(tmp_path: Path, trained_folder: Path) -> None:
    run(Experiment.load(mine(tmp_path, trained_folder, "seeds = [3]")))
    (row, *_) = rows()
    told = row.record["fit"]
    assert told["file"].removesuffix(".safetensors") == row.record["hashes"]["fit"][:24]
    assert told["parameters"] == 2 * 32 * 128  # both matrices of the block
    assert told["notes"]["training"]["steps"] == 4 and told["notes"]["cases"]["train"] == 3
    assert told["learnt"]["EA"][3] == 3 and told["learnt"]["DD"][0] is not None
    found = Cell((Run(row.unit, row),), None, None).summary
    assert list(found["fit EA"]) == told["learnt"]["EA"] and found["fit DD"].n == 3
    assert found["fit steps"].mean == told["notes"]["training"]["best"]
    assert told["seconds"] > 0 and told["peak_memory"] > 0 and not told["resumed"]
    assert row.record["config"]["layers"] == [1] and row.record["seeds"]["editor"] == 3
    editor = load_editor(Path("results/fits") / told["file"], LanguageModel.load(trained_folder))
    assert editor.config.seed == 3
    names = {file.suffix for file in Path("results/fits").iterdir()}
    assert names == {".safetensors", ".json", ".lock"}  # the checkpoints are gone


CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from errata.editors import training
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.run import run
if len(sys.argv) > 2:
    advance = training._Run.advance
    def dying(self):
        if self.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        advance(self)
    training._Run.advance = dying
assert not run(Experiment.load(sys.argv[1])).failed
"""


def child(file: Path, *more: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(file), *map(str, more)])


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")
def test_a_fit_that_was_killed_goes_on_and_gives_the_same_file(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mine(tmp_path, trained_folder)
    assert child(file, 3).wait() == -signal.SIGKILL
    (checkpoint,) = Path("results/fits").glob("*.fit/*.safetensors")
    assert not list(Path("results/fits").glob("*.safetensors"))
    assert child(file).wait() == 0
    (killed,) = Path("results/fits").glob("*.safetensors")
    (about,) = Path("results/fits").glob("*.json")
    assert json.loads(about.read_text(encoding="utf-8"))["resumed"] and not checkpoint.exists()
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "another"))  # where nothing is known
    run(Experiment.load(file), folder=tmp_path / "whole")
    (whole,) = (tmp_path / "whole" / "fits").glob("*.safetensors")
    assert whole.name == killed.name
    lm = LanguageModel.load(trained_folder)
    # In another process sums may be added up in another order.
    for name, tensor in load_editor(whole, lm).tensors().items():
        assert tensor.allclose(load_editor(killed, lm).tensors()[name], atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_of_two_processes_one_fits_and_the_other_waits(
    tmp_path: Path, trained_folder: Path
) -> None:
    file = mine(tmp_path, trained_folder)
    children = [child(file) for _ in range(3)]
    assert [one.wait() for one in children] == [0, 0, 0]
    (_, _) = rows()
    # Who waited took the file as it was: it was written once.
    fitting = [row.record["seconds"]["fitting"] for row in rows()]
    (about,) = Path("results/fits").glob("*.json")
    took = json.loads(about.read_text(encoding="utf-8"))["seconds"]
    assert len([seconds for seconds in fitting if seconds > took]) >= 1


def test_a_fit_that_fails_is_told_of_its_units(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Mend, *_: Any, **__: Any) -> Any:
        raise FitError("step 7: the loss became nan")

    experiment = Experiment.load(mine(tmp_path, trained_folder))
    with monkeypatch.context() as patch:
        patch.setattr(Mend, "fit", failing)
        assert [why for _, why in run(experiment).failed] == ["step 7: the loss became nan"] * 2
    assert run(experiment).done == 2
    (file,) = Path("results/fits").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    other = mine(tmp_path, trained_folder, 'metrics = ["teacher-forced"]', name="other")
    ((_, why), _) = run(Experiment.load(other)).failed
    assert file.name in why


def test_a_stream_of_edits_by_a_fitted_editor(tmp_path: Path, trained_folder: Path) -> None:
    experiment = Experiment.load(mine(tmp_path, trained_folder))
    base = replace(experiment.base, protocol="sequential")
    assert run(replace(experiment, base=base, sweep={})).failed == ()
    (row,) = rows()
    assert len(row.points) == 3 and row.record["fit"]["parameters"]


@pytest.mark.parametrize(
    ("method", "fit", "told"),
    [
        ("memit", "count = 4", "'MEMIT': memit needs no fitting.*: .*mend, salem"),
        ("mend", "coutn = 4", r"editor 1, `fit` has no field 'coutn'.*Did you mean 'count'"),
        ("mend", "count = 0", "`count` must be a whole number from 1"),
        ("mend", "data = 4", "`data` must be a text"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, fit: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        f'models = ["pocket"]\n[[editor]]\nmethod = "{method}"\n[editor.fit]\n{fit}\n',
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match=rf"(?s)mine\.toml: .*{told}"):
        Experiment.load(path)


def test_a_fit_may_be_left_to_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'models = ["pocket"]\ncount = 9\n[[editor]]\nmethod = "mend"\n', encoding="utf-8"
    )
    (unit,) = Experiment.load(path).units()
    assert unit.fit == {"data": "pocket", "count": None, "clear_of": 9}
    assert unit == Unit.from_dict(json.loads(json.dumps(unit.to_dict())))
    (piece,) = keyed([unit]).values()
    assert fit_file("results", piece.hashes["fit"]).parent == Path("results/fits")


def test_fits_are_reckoned_for_models_that_are_not_here(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.jobs.studies import forecast

    monkeypatch.setattr(forecast, "STAND_IN", str(trained_folder))
    monkeypatch.setattr(forecast, "SAMPLE", 1)
    monkeypatch.setattr(forecast, "_speed", lambda: 1e11)
    file = mine(tmp_path, trained_folder, "seeds = [0, 1]")
    text = file.read_text(encoding="utf-8").replace(str(trained_folder), "some/model", 1)
    shape = "layers = 12\nd_model = 768\nd_ff = 3072\nvocabulary = 50257\n"
    file.write_text(text + '\n[model."some/model"]\n' + shape, encoding="utf-8")
    found = plan(Experiment.load(file))
    assert (found.fits, found.costs[0].how) == (2, "estimated")
    longer = file.read_text(encoding="utf-8").replace(
        '"training.steps" = 4', '"training.steps" = 80'
    )
    file.write_text(longer, encoding="utf-8")
    assert plan(Experiment.load(file)).seconds > 5 * found.seconds
