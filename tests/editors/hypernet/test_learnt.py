"""What every learnt editor promises: MEND, SaLEM, KE and ENN against all behaviours.

They are fitted for a few steps only: what an editor has learnt is tested where it is at home.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors import EDITORS, Background
from errata.editors.fitted import load_editor
from errata.editors.hypernet.learnt import LearntEditor
from errata.editors.trainable import Trainable, TrainingCases
from errata.editors.training import CHECKPOINT
from errata.edits.file import load_edit
from errata.edits.weights import WeightEdit
from errata.errors import FitError, RequestError, TokenizationError, WrongModelError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.lm.weights import weight_out_in
from errata.requests import Case, Probe, Request
from tests.conftest import TEMPLATES
from tests.editors.hypernet.capitals import divided
from tests.lm.families import MAX_LENGTH, tiny_lm

TRAINING: dict[str, Any] = {"steps": 6, "validate_every": 2, "validation": 4, "batch": 4}
SMALL: dict[str, dict[str, Any]] = {
    "mend": {"network": {"rank": 8}},
    "salem": {"network": {"rank": 8}},
    "ke": {"network": {"hidden": 8, "condition": 16, "inner": 8}},
    "enn": {},
}
"""Numbers with which a fit takes in a moment."""

WILD: dict[str, dict[str, Any]] = {
    "mend": {"network": {"rank": 8, "learning_rate": 1e30, "step_learning_rate": 1e30}},
    "salem": {"network": {"rank": 8, "learning_rate": 1e30, "step_learning_rate": 1e30}},
    "ke": {"network": SMALL["ke"]["network"] | {"learning_rate": 1e30}},
    "enn": {"editable": {"learning_rate": 1e30, "step_learning_rate": 1e30}},
}
"""Learning rates that no number outlives."""

REQUESTS = [
    Request(TEMPLATES[0], "France", "Rome", "Paris"),
    Request(TEMPLATES[1], "Peru", "Cairo", "Lima"),
]

learnt = pytest.mark.parametrize("method", SMALL)


def unfitted(method: str, **settings: Any) -> Trainable:
    entry = EDITORS[method]
    values = SMALL[method] | {"training": TRAINING} | settings
    editor = entry.editor(entry.config.from_dict(values), Background())
    assert isinstance(editor, Trainable)
    return editor


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


@pytest.fixture(scope="module")
def fitted(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a method's editor, fitted once; its checkpoints are in the folder beside it."""
    folder = tmp_path_factory.mktemp("learnt")

    def file(method: str) -> Path:
        found = folder / f"{method}.safetensors"
        if not found.exists():
            lm = LanguageModel.load(trained_folder)
            before, state = weights(lm), torch.random.get_rng_state()
            editor = unfitted(method).fit(lm, divided(), folder=folder / method)
            assert same(before, weights(lm))
            assert torch.equal(state, torch.random.get_rng_state())
            editor.save(found)
        return found

    return file


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def opened(file: Path, lm: LanguageModel) -> LearntEditor:
    editor = load_editor(file, lm)
    assert isinstance(editor, LearntEditor)
    return editor


def dense(edit: WeightEdit) -> dict[str, Tensor]:
    return {path: change.dense() for path, change in edit.changes.items()}


def test_these_are_all_of_them() -> None:
    assert set(SMALL) == {
        name for name, entry in EDITORS.items() if "hypernet" in entry.editor.__module__
    }


@learnt
def test_an_edit_is_for_the_model_as_it_is_and_leaves_nothing_behind(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path], tmp_path: Path
) -> None:
    editor, before = opened(fitted(method), lm), weights(lm)
    held, state = editor.tensors(), torch.random.get_rng_state()
    edit = editor.edit(lm, REQUESTS)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(before, weights(lm)) and not lm.applied
    assert all(p.requires_grad and p.grad is None for p in lm.network.parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in editor.tensors().items())
    assert edit.requests == tuple(REQUESTS) and edit.record.method == method
    edit.save(tmp_path / "edit.safetensors")
    loaded = load_edit(tmp_path / "edit.safetensors")
    assert edit.equals(loaded)
    with loaded.applied(lm):
        assert not same(before, weights(lm))
    assert same(before, weights(lm))


@learnt
def test_a_file_holds_the_very_same_editor(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path], tmp_path: Path
) -> None:
    editor = opened(fitted(method), lm)
    editor.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == fitted(method).read_bytes()
    assert editor.edit(lm, REQUESTS).equals(opened(fitted(method), lm).edit(lm, REQUESTS))


@learnt
def test_several_requests_change_what_each_would_alone(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path]
) -> None:
    """Beyond what an editor changes in any case: a retraining, once."""
    editor = opened(fitted(method), lm)
    alone = [dense(editor.edit(lm, [request])) for request in REQUESTS]
    for path, change in dense(editor.edit(lm, REQUESTS)).items():
        always = getattr(editor, "editable", None)
        once = always.differences[always.paths.index(path)] if always else 0.0
        assert_close(change, alone[0][path] + alone[1][path] - once, rtol=1e-4, atol=1e-5)


@learnt
def test_in_a_stream_each_edit_starts_from_the_edited_model(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path]
) -> None:
    editor, before = opened(fitted(method), lm), weights(lm)
    plain = editor.edit(lm, REQUESTS[1:])
    first = editor.edit(lm, REQUESTS[:1])
    first.apply_(lm)
    once = weights(lm)
    second = opened(fitted(method), lm).edit(lm, REQUESTS[1:])
    assert same(once, weights(lm))
    assert second.base == first.base  # both are changes of the weights as loaded
    assert not second.equals(plain)  # the gradients are those of the edited model
    wanted = [Example(request.text, request.target) for request in REQUESTS[1:]]
    with torch.no_grad():
        earlier = losses(lm, wanted)
        second.apply_(lm)
        assert not torch.equal(earlier, losses(lm, wanted))
    second.undo_(lm)
    assert same(once, weights(lm))
    first.undo_(lm)
    assert same(before, weights(lm))


@learnt
def test_a_fit_that_was_cut_short_goes_on_to_the_same_bytes(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path], tmp_path: Path
) -> None:
    def cut(stage: str, done: int, total: int) -> None:
        if stage == "steps" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unfitted(method).fit(lm, divided(), folder=tmp_path / "fit", progress=cut)
    began: list[int] = []
    editor = unfitted(method).fit(
        lm,
        divided(),
        folder=tmp_path / "fit",
        progress=lambda stage, done, total: began.append(done) if stage == "steps" else None,
    )
    assert began[0] == 4  # the last checkpoint before
    editor.save(tmp_path / "editor.safetensors")
    whole = fitted(method)
    assert (tmp_path / "editor.safetensors").read_bytes() == whole.read_bytes()
    checkpoint = (whole.parent / method / CHECKPOINT).read_bytes()
    assert (tmp_path / "fit" / CHECKPOINT).read_bytes() == checkpoint


@learnt
def test_an_editor_for_another_model_or_another_layer_is_refused(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path], trained_folder: Path
) -> None:
    editor, other = opened(fitted(method), lm), LanguageModel.load(trained_folder)
    with torch.no_grad():
        weight_out_in(other.module(tuple(editor.fit.base)[0]))[0, 0] += 1
    with pytest.raises(WrongModelError, match="holds other weights"):
        load_editor(fitted(method), other)
    with pytest.raises(WrongModelError, match="holds other weights"):
        editor.edit(other, REQUESTS)
    with pytest.raises(WrongModelError, match="has no "):
        load_editor(fitted(method), tiny_lm("llama"))


@learnt
def test_numbers_that_overflow_stop_the_fit_and_the_last_good_checkpoint_stays(
    method: str, lm: LanguageModel, tmp_path: Path
) -> None:
    before = weights(lm)
    with pytest.raises(FitError, match=r"step \d+: .*Fit again with lower learning rates"):
        unfitted(method, **WILD[method]).fit(lm, divided(), folder=tmp_path)
    assert same(before, weights(lm))


def rivers(lm: LanguageModel) -> list[Case]:
    """Cases for a model of any kind."""
    old, new = ("refutes", "supports") if lm.task == "classify" else ("the North Sea", "Rome")
    return [
        Case(
            Request("{} flows to", river, new, old if river != "The Nile" else None),
            paraphrases=(f"To where does the river go? {river}",),
            neighbours=(Probe("The Rhine flows to", old),),
        )
        for river in ("The Nile", "The Danube", "The river")
    ]


@pytest.mark.parametrize("kind", ["llama", "opt", "bert", "bert-labels", "t5", "bart"])
@pytest.mark.parametrize("method", ["ke", "enn"])  # MEND's network: test_mend.py
def test_models_of_every_kind_are_edited(method: str, kind: str, tmp_path: Path) -> None:
    lm = tiny_lm(kind)
    cases = rivers(lm)
    short = TRAINING | {"steps": 2, "batch": 2}
    unfitted(method, training=short).fit(lm, TrainingCases.split(cases)).save(tmp_path / "editor")
    before = weights(lm)
    edit = load_editor(tmp_path / "editor", lm).edit(lm, [case.request for case in cases])
    with edit.applied(lm):
        assert not same(before, weights(lm))
    assert same(before, weights(lm))


@learnt
def test_labels_that_the_model_lacks_are_named_before_the_first_step(method: str) -> None:
    lm = tiny_lm("bert-labels")
    cases, steps = rivers(lm), []
    unknown = Case(Request("{} is", "The Rhine", "doubtful"), neighbours=cases[0].neighbours)
    with pytest.raises(RequestError, match=r"no label 'doubtful'.*supports"):
        unfitted(method).fit(
            lm,
            TrainingCases((*cases, unknown), tuple(cases[:1])),
            progress=lambda stage, *_: steps.append(stage),
        )
    assert "steps" not in steps
    editor = unfitted(method, training=TRAINING | {"steps": 2}).fit(lm, TrainingCases.split(cases))
    with pytest.raises(RequestError, match="no label 'doubtful'"):
        editor.edit(lm, [unknown.request])


@learnt
def test_texts_that_are_too_long_are_named_before_the_first_step(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path]
) -> None:
    cases = divided()
    endless = Request("{} is a country, " + "and a country " * MAX_LENGTH * 4, "France", "Rome")
    steps: list[str] = []
    with pytest.raises(TokenizationError, match="longer than"):
        unfitted(method).fit(
            lm,
            TrainingCases((*cases.train, Case(endless)), cases.validation),
            progress=lambda stage, *_: steps.append(stage),
        )
    assert "steps" not in steps
    before = weights(lm)
    with pytest.raises(TokenizationError, match="longer than"):
        opened(fitted(method), lm).edit(lm, [*REQUESTS, endless])
    assert same(before, weights(lm))


@learnt
def test_empty_editing_sets_are_refused(
    method: str, lm: LanguageModel, fitted: Callable[[str], Path]
) -> None:
    cases = divided()
    for empty in (TrainingCases((), cases.validation), TrainingCases(cases.train, ())):
        with pytest.raises(FitError, match="needs cases to learn from"):
            unfitted(method).fit(lm, empty)
    with pytest.raises(RequestError, match="no request"):
        opened(fitted(method), lm).edit(lm, [])
    with pytest.raises(FitError, match="must be fitted"):
        unfitted(method).edit(lm, REQUESTS)
