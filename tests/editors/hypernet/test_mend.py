"""MEND from fit to file to edit: on a tiny model that knows CAPITALS, on every kind of model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors.background import Background
from errata.editors.fitted import load_editor
from errata.editors.hypernet.gradients import decompose
from errata.editors.hypernet.mend import FittedMend, Mend, MendConfig
from errata.editors.hypernet.transform import TransformConfig, Update
from errata.editors.trainable import Fit, TrainingCases
from errata.editors.training import CHECKPOINT
from errata.editors.wordings import example
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, EditFileError, FitError, RequestError, WrongModelError
from errata.jobs.fit import judged
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.requests import Case, Probe, Request
from tests.conftest import TEMPLATES
from tests.editors.hypernet.capitals import QUICK, divided, killed
from tests.lm.families import tiny_lm

REPOSITORY = Path(__file__).resolve().parents[3]
REQUESTS = [
    Request(TEMPLATES[0], "France", "Rome", "Paris"),
    Request(TEMPLATES[1], "Peru", "Cairo", "Lima"),
]


def mend(**settings: object) -> Mend:
    return Mend(MendConfig.from_dict(QUICK | settings), Background())


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


@pytest.fixture(scope="module")
def fitted(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An editor's file; its checkpoints are in the folder `fit` beside it."""
    folder = tmp_path_factory.mktemp("mend")
    lm = LanguageModel.load(trained_folder)
    before = weights(lm)
    editor = mend().fit(lm, divided(), folder=folder / "fit")
    assert same(before, weights(lm))
    editor.save(folder / "mend.safetensors")
    return folder / "mend.safetensors"


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def opened(file: Path, lm: LanguageModel) -> FittedMend:
    editor = load_editor(file, lm)
    assert isinstance(editor, FittedMend)
    return editor


def one_step(lm: LanguageModel, step: float) -> FittedMend:
    """MEND as it begins, without normalisation: one step of plain gradient descent."""
    config = MendConfig(
        network=TransformConfig(units="absolute", step=step, normalise=False),
        layers=mend().layers(lm),
    )
    paths = tuple(p(i) for i in config.layers for p in (lm.mlp_in_path, lm.mlp_out_path))
    return FittedMend(config, Fit.of(lm, paths), Update.of(lm, paths, config.network))


def test_before_it_has_learnt_an_edit_is_one_step_of_gradient_descent(lm: LanguageModel) -> None:
    editor = one_step(lm, 0.05)
    edit = editor.edit(lm, REQUESTS[:1])
    for path, rows in decompose(lm, [example(REQUESTS[0])], edit.paths).items():
        assert_close(edit.changes[path].dense(), -0.05 * rows.low_rank().dense())


def test_it_learns_to_edit_better_than_a_step_of_gradient_descent(
    lm: LanguageModel, fitted: Path
) -> None:
    cases = divided().validation
    learnt = judged(lm, load_editor(fitted, lm), cases)
    steps = [judged(lm, one_step(lm, step), cases) for step in (0.01, 0.03, 0.1, 0.3)]
    best = max(steps, key=lambda scores: scores["EA"].mean - scores["DD"].mean)
    assert learnt["EA"].mean > best["EA"].mean + 0.2
    assert learnt["DD"].mean < max(best["DD"].mean, 0.05)
    assert learnt["EA"].mean > 0.7


def test_an_edit_is_low_rank_and_nothing_is_left_behind(lm: LanguageModel, fitted: Path) -> None:
    editor, before = opened(fitted, lm), weights(lm)
    edit = editor.edit(lm, REQUESTS[:1])
    assert isinstance(edit, WeightEdit)
    assert same(before, weights(lm)) and not lm.applied
    assert all(p.requires_grad and p.grad is None for p in lm.network.parameters())
    assert set(edit.changes) == {
        path(layer) for layer in (1, 2, 3) for path in (lm.mlp_in_path, lm.mlp_out_path)
    }
    tokens = len(lm.tokenizer(REQUESTS[0].text + " Rome")["input_ids"]) - 1
    assert all(0 < change.rank <= tokens for change in edit.changes.values())
    with edit.applied(lm):
        assert not same(before, weights(lm))
    assert same(before, weights(lm))
    assert edit.record.method == "mend" and edit.record.config["layers"] == [1, 2, 3]
    assert edit.record.notes["fit"]["training"]["steps"] > 0


def test_several_requests_change_what_each_would_alone(lm: LanguageModel, fitted: Path) -> None:
    editor = opened(fitted, lm)
    together = editor.edit(lm, REQUESTS)
    alone = [editor.edit(lm, [request]) for request in REQUESTS]
    for path, change in together.changes.items():
        wanted = alone[0].changes[path].dense() + alone[1].changes[path].dense()
        assert_close(change.dense(), wanted, rtol=1e-4, atol=1e-5)


def test_editing_teaches_it_nothing(lm: LanguageModel, fitted: Path) -> None:
    editor = opened(fitted, lm)
    before = editor.tensors()
    first = editor.edit(lm, REQUESTS)
    second = editor.edit(lm, REQUESTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in editor.tensors().items())
    assert first.equals(second)


def test_a_file_holds_the_very_same_editor(lm: LanguageModel, fitted: Path, tmp_path: Path) -> None:
    editor = opened(fitted, lm)
    editor.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == fitted.read_bytes()
    assert editor.config == mend(layers=[1, 2, 3]).config
    assert editor.fit.notes["cases"] == {"train": 45, "validation": 11}


def test_it_works_on_a_model_that_is_edited_already(lm: LanguageModel, fitted: Path) -> None:
    editor = opened(fitted, lm)
    plain = editor.edit(lm, REQUESTS[1:])
    first = editor.edit(lm, REQUESTS[:1])
    first.apply_(lm)
    second = opened(fitted, lm).edit(lm, REQUESTS[1:])
    assert second.base == first.base  # both are changes of the weights as loaded
    assert not second.equals(plain)  # the gradients are those of the edited model
    second.apply_(lm)
    second.undo_(lm)
    first.undo_(lm)


def test_another_model_is_refused(fitted: Path, trained_folder: Path) -> None:
    other = LanguageModel.load(trained_folder)
    with torch.no_grad():
        weight_out_in(other.mlp_out(2))[0, 0] += 1
    with pytest.raises(WrongModelError, match="fitted to .* holds other weights"):
        load_editor(fitted, other)
    with pytest.raises(WrongModelError, match="bfloat16"):
        load_editor(fitted, LanguageModel.load(trained_folder, dtype=torch.bfloat16))
    with pytest.raises(WrongModelError, match="has no "):
        load_editor(fitted, tiny_lm("llama"))
    editor = load_editor(fitted, LanguageModel.load(trained_folder))
    with pytest.raises(WrongModelError, match="other weights"):
        editor.edit(other, REQUESTS)


def test_a_file_that_is_no_editor_is_refused(
    lm: LanguageModel, fitted: Path, tmp_path: Path
) -> None:
    edit = load_editor(fitted, lm).edit(lm, REQUESTS)
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(EditFileError, match="no fitted editor"):
        load_editor(tmp_path / "edit.safetensors", lm)
    data = bytearray(fitted.read_bytes())
    data[-3] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(data)
    with pytest.raises(EditFileError, match="altered"):
        load_editor(tmp_path / "altered.safetensors", lm)
    with pytest.raises(EditFileError, match="No such file"):
        load_editor(tmp_path / "absent.safetensors", lm)


def test_it_says_to_fit_first(lm: LanguageModel) -> None:
    with pytest.raises(FitError, match=r"must be fitted to .* `errata fit mend -m .*--editor mend"):
        mend().edit(lm, REQUESTS)
    with pytest.raises(FitError, match="must be fitted"):
        next(mend().edit_each(lm, [REQUESTS]))


def test_contradictions_and_emptiness_are_refused(lm: LanguageModel, fitted: Path) -> None:
    editor = opened(fitted, lm)
    with pytest.raises(RequestError, match="contradict"):
        editor.edit(lm, [REQUESTS[0], Request(TEMPLATES[0], "France", "Lima")])
    with pytest.raises(RequestError, match="no request"):
        editor.edit(lm, [])


def test_a_layer_beyond_the_model_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="blocks 0 to 3, not 9"):
        mend(layers=[9]).fit(lm, divided())


def test_cases_without_neighbours_are_refused(lm: LanguageModel) -> None:
    cases = TrainingCases((Case(REQUESTS[0]),), (Case(REQUESTS[1]),))
    with pytest.raises(FitError, match="neighbours"):
        mend().fit(lm, cases)
    settings = {"objective": {"kept": 0.0}, "training": {"steps": 2, "validate_every": 1}}
    assert mend(**settings).fit(lm, cases).edit(lm, REQUESTS).requests


def test_a_killed_fit_goes_on_to_the_same_file(
    lm: LanguageModel, trained_folder: Path, fitted: Path, tmp_path: Path
) -> None:
    """Killed with SIGKILL at step 50, gone on with, and the same bytes as never interrupted."""
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", killed(trained_folder, tmp_path / "fit")],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": "src:."},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == -9, done.stderr
    began: list[int] = []
    editor = mend().fit(
        lm,
        divided(),
        folder=tmp_path / "fit",
        progress=lambda stage, made, total: began.append(made),
    )
    assert began[0] == 40  # the last checkpoint before
    editor.save(tmp_path / "mend.safetensors")
    assert (tmp_path / "mend.safetensors").read_bytes() == fitted.read_bytes()
    checkpoint = (fitted.parent / "fit" / CHECKPOINT).read_bytes()
    assert (tmp_path / "fit" / CHECKPOINT).read_bytes() == checkpoint


def test_a_fit_in_which_numbers_overflow_says_where(lm: LanguageModel, tmp_path: Path) -> None:
    wild = {"rank": 32, "learning_rate": 1e30, "step_learning_rate": 1e30}
    with pytest.raises(FitError, match=r"step \d+: .*Fit again with lower learning rates"):
        mend(network=wild).fit(lm, divided(), folder=tmp_path)


@pytest.mark.parametrize("kind", ["llama", "opt", "bert", "bert-labels", "t5", "bart"])
def test_it_is_fitted_to_and_edits_models_of_every_kind(kind: str, tmp_path: Path) -> None:
    lm = tiny_lm(kind)
    old, new = ("refutes", "supports") if lm.task == "classify" else ("the North Sea", "Rome")
    cases = [
        Case(
            Request("{} flows to", river, new),
            paraphrases=(f"To where does the river go? {river}",),
            neighbours=(Probe("The Rhine flows to", old),),
        )
        for river in ("The Nile", "The Danube", "The river")
    ]
    settings = {"training": {"steps": 3, "validate_every": 2, "batch": 2}}
    editor = mend(**settings).fit(lm, TrainingCases.split(cases))
    assert editor.config.layers == tuple(range(lm.layers - 3, lm.layers))
    editor.save(tmp_path / "mend.safetensors")
    before = weights(lm)
    edit = load_editor(tmp_path / "mend.safetensors", lm).edit(lm, [cases[0].request])
    with edit.applied(lm):
        assert not same(before, weights(lm))
    assert same(before, weights(lm))
    scores = judged(lm, editor, cases)
    assert ("DD.perplexity" in scores) == (lm.task == "generate")
