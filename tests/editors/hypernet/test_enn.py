"""ENN: its steps are gradient descent, their gradients are exact to second order, and it learns."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors.background import Background
from errata.editors.hypernet.enn import (
    Editable,
    EditableConfig,
    Enn,
    EnnConfig,
    EnnLearner,
    FittedEnn,
)
from errata.editors.hypernet.learnt import mlp_paths, shapes, usual_change
from errata.editors.trainable import Fit
from errata.editors.wordings import example
from errata.errors import ConfigError
from errata.jobs.fit import judged
from errata.lm.load import LanguageModel
from errata.lm.loss import losses
from errata.lm.weights import out_in, weight_out_in
from errata.requests import Case
from tests.editors.hypernet.capitals import capital_cases, divided
from tests.lm.families import tiny_lm

LAYERS = (1, 2)


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def editable(lm: LanguageModel, *, moved: bool = True, **settings: object) -> Editable:
    """A retraining, at random where `moved`."""
    paths = mlp_paths(lm, LAYERS)
    made = Editable(shapes(lm, paths), EditableConfig.from_dict(settings))
    made.begin_(lm, [example(case.request) for case in capital_cases()[:8]])
    draw = torch.Generator().manual_seed(0)
    if moved:
        with torch.no_grad():
            for difference, scale in zip(made.differences, made.scales, strict=True):
                difference.copy_(0.1 * scale * torch.randn(difference.shape, generator=draw))
            made.steps.copy_(1 + 0.2 * torch.randn(made.steps.shape, generator=draw))
    return made


def step_by_hand(lm: LanguageModel, made: Editable, case: Case) -> dict[str, Tensor]:
    """The whole change, D and the steps, on a copy of the model whose weights are really moved."""
    other = LanguageModel.of(copy.deepcopy(lm.network), lm.tokenizer, name="other")
    modules = [other.module(path) for path in made.paths]
    total = [difference.detach().clone() for difference in made.differences]
    with torch.no_grad():
        for module, difference in zip(modules, made.differences, strict=True):
            weight_out_in(module).add_(difference)
    for _ in range(made.config.inner):
        other.network.zero_grad()
        torch.autograd.backward(losses(other, [example(case.request)]).sum())
        with torch.no_grad():
            for number, module in enumerate(modules):
                assert isinstance(module.weight, Tensor) and module.weight.grad is not None
                step = -made.units[number] * made.steps[number]
                taken = step * out_in(module, module.weight.grad)
                total[number] += taken
                weight_out_in(module).add_(taken)
    return dict(zip(made.paths, total, strict=True))


@pytest.mark.parametrize("inner", [1, 3])
def test_an_edit_is_the_retraining_and_steps_down_the_retrained_models_gradient(
    lm: LanguageModel, inner: int
) -> None:
    made, case = editable(lm, inner=inner), capital_cases()[0]
    wanted = step_by_hand(lm, made, case)
    config = EnnConfig(layers=LAYERS, editable=made.config)
    edit = FittedEnn(config, Fit.of(lm, made.paths), made).edit(lm, [case.request])
    for path, change in edit.changes.items():
        assert_close(change.dense(), wanted[path])


def test_unfitted_a_typical_gradient_moves_a_weight_by_the_first_step(lm: LanguageModel) -> None:
    paths, request = mlp_paths(lm, LAYERS), capital_cases()[0].request
    made = Editable(shapes(lm, paths), EditableConfig(step=0.07))
    made.begin_(lm, [example(request)])
    edit = FittedEnn(EnnConfig(layers=LAYERS), Fit.of(lm, paths), made).edit(lm, [request])
    for path, change in edit.changes.items():
        moved = change.dense().square().mean().sqrt()
        assert float(moved) == pytest.approx(0.07 * usual_change(lm, path), rel=1e-3)


def test_the_steps_are_the_same_with_and_without_a_gradient_of_their_own(
    lm: LanguageModel,
) -> None:
    made, examples = editable(lm, inner=2), [example(c.request) for c in capital_cases()[:5]]
    with made.retrained(lm):
        plain = made.descended(lm, examples)
        traced = made.descended(lm, examples, differentiable=True)
    for path in made.paths:
        assert torch.equal(plain[path].owner, traced[path].owner)
        assert_close(plain[path].low_rank().dense(), traced[path].low_rank().dense())


@pytest.mark.parametrize(
    ("kind", "inner"), [("gpt2", 1), ("gpt2", 2), ("opt", 2), ("bert", 2), ("bart", 2)]
)
def test_gradients_through_the_steps_are_those_of_finite_differences(kind: str, inner: int) -> None:
    """In float64, along a random direction of every D and of the step sizes.

    Without the divergence from the retrained model, which by design has no gradient for that model.
    """
    lm = tiny_lm(kind)
    lm.network.double()
    made = editable(lm, inner=inner, units="absolute", step=0.3).double()
    config = EnnConfig(layers=LAYERS, editable=made.config)
    learner, cases = EnnLearner(lm, made, config).train(), capital_cases()[:3]

    def loss() -> Tensor:
        found = learner.loss(cases, random.Random(0))
        return found["edit"] + found["base"]

    torch.autograd.backward(loss())
    draw = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        assert parameter.grad is not None
        along = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        along /= along.norm()
        slope = float((parameter.grad * along).sum())
        values, h = [], 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(along, alpha=sign * h)
                values.append(float(loss()))
                parameter.sub_(along, alpha=sign * h)
        found = (values[0] - values[1]) / (2 * h)
        assert slope == pytest.approx(found, rel=1e-4, abs=1e-7)


def test_retrained_the_model_is_what_it_would_be_with_the_weights_moved(
    lm: LanguageModel,
) -> None:
    made, examples = editable(lm), [example(case.request) for case in capital_cases()[:3]]
    before = losses(lm, examples)
    with made.retrained(lm), torch.no_grad():
        inside = losses(lm, examples)
    assert torch.equal(losses(lm, examples), before)
    with torch.no_grad():
        for path, difference in zip(made.paths, made.differences, strict=True):
            weight_out_in(lm.module(path)).add_(difference)
    assert_close(inside, losses(lm, examples))


def test_the_loss_adds_up(lm: LanguageModel) -> None:
    made = editable(lm, base=2.0)
    learner = EnnLearner(lm, made, EnnConfig(layers=LAYERS, editable=made.config)).eval()
    with torch.no_grad():
        found = learner.loss(capital_cases()[:4], random.Random(0))
    parts = 0.1 * found["edit"] + found["kept"] + 2.0 * found["base"]
    assert_close(found["loss"], parts)
    assert float(found["base"]) > 0 and float(found["kept"]) > 0


def test_a_retraining_is_put_on_a_model_once(lm: LanguageModel) -> None:
    """The second edit of a stream holds steps alone, those of the model with the first on it."""
    made = editable(lm)
    editor = FittedEnn(EnnConfig(layers=LAYERS, editable=made.config), Fit.of(lm, made.paths), made)
    first = editor.edit(lm, [capital_cases()[0].request])
    first.apply_(lm)
    second = editor.edit(lm, [capital_cases()[9].request])
    assert second.record.notes["builds upon"] == first.record.notes["retraining"]
    tokens = len(lm.tokenizer(capital_cases()[9].request.text)["input_ids"]) + 2
    assert all(change.rank <= tokens for change in second.changes.values())
    first.undo_(lm)
    assert "retraining" in editor.edit(lm, [capital_cases()[9].request]).record.notes


def test_it_learns_to_edit(lm: LanguageModel) -> None:
    numbers = {"steps": 60, "validate_every": 20}
    rates = {"step": 0.1 * 32**0.5, "learning_rate": 0.01, "step_learning_rate": 0.1}
    config = EnnConfig.from_dict({"training": numbers, "editable": rates})
    cases = divided()
    editor = Enn(config, Background()).fit(lm, cases)
    assert editor.config.layers == (1, 2, 3)
    fresh = Editable(shapes(lm, editor.editable.paths), config.editable)
    fresh.begin_(lm, [example(case.request) for case in cases.train])
    unlearnt = FittedEnn(config, Fit.of(lm, fresh.paths), fresh)
    learnt, before = (judged(lm, e, cases.validation) for e in (editor, unlearnt))
    assert learnt["EA"].mean > 0.7 and learnt["EA"].mean > before["EA"].mean
    assert learnt["DD"].mean < 0.1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"inner": 0}, "inner must be positive"),
        ({"step": -1.0}, "step must not be negative"),
        ({"units": "miles"}, "units is one of relative, absolute"),
    ],
)
def test_numbers_without_sense_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EditableConfig.from_dict(settings)
