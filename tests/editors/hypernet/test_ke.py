"""KE: what it reads, its Lagrangian, and how far it learns on a tiny model that knows CAPITALS."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from errata.editors.background import Background
from errata.editors.hypernet.gradients import decompose
from errata.editors.hypernet.ke import FittedKe, Ke, KeConfig, KeLearner, begun, conditions
from errata.editors.hypernet.learnt import mlp_paths, usual_change
from errata.editors.trainable import Fit
from errata.editors.wordings import example
from errata.errors import ConfigError
from errata.jobs.fit import judged
from errata.lm.load import LanguageModel
from errata.lm.loss import predictions
from errata.requests import Request
from tests.conftest import TEMPLATES
from tests.editors.hypernet.capitals import capital_cases, divided
from tests.lm.families import tiny_lm

SMALL = {"hidden": 16, "condition": 32, "inner": 16, "learning_rate": 0.01, "scale": 0.1 * 32**0.5}


def config(**settings: object) -> KeConfig:
    return KeConfig.from_dict({"network": SMALL} | settings)


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def learner(lm: LanguageModel, **settings: object) -> KeLearner:
    numbers = config(**settings)
    return KeLearner(lm, begun(lm, mlp_paths(lm, [1, 2]), capital_cases()[:4], numbers), numbers)


def test_it_reads_what_is_said_what_shall_be_said_and_the_prompt(lm: LanguageModel) -> None:
    told = Request(TEMPLATES[0], "France", "Rome", "Paris")
    asked = Request(TEMPLATES[0], "Peru", "Rome")
    (said,) = predictions(lm, [asked.text], new_tokens=4)
    assert conditions(lm, [told, asked]) == [
        f"Paris >> Rome || {told.text}",
        f"{said} >> Rome || {asked.text}",
    ]
    classifier = tiny_lm("bert-labels")
    (text,) = conditions(classifier, [Request("{} is", "The Nile", "supports")])
    assert text.split(" >> ")[0] in classifier.labels


def test_unfitted_it_takes_one_step_down_the_gradient(lm: LanguageModel) -> None:
    """A typical gradient makes half of `scale` times a change that is as large as the weight."""
    paths, cases = mlp_paths(lm, [1, 2]), capital_cases()[:1]
    fitted = FittedKe(config(), Fit.of(lm, paths), begun(lm, paths, cases, config()))
    edit = fitted.edit(lm, [cases[0].request])
    gradients = decompose(lm, [example(cases[0].request)], paths)
    for path in paths:
        gradient = gradients[path].low_rank().dense()
        wide = (
            0.05 * 32**0.5 * usual_change(lm, path)
        )  # one case, so its gradient is the typical one
        assert_close(edit.changes[path].dense(), -wide * gradient / gradient.square().mean().sqrt())


def test_training_minimises_the_lagrangian_and_the_multiplier_climbs(lm: LanguageModel) -> None:
    made, cases = learner(lm, constraint={"margin": 0.05, "rate": 0.5}).train(), capital_cases()
    found = made.loss(cases[:4], random.Random(0))
    assert_close(found["loss"], found["edit"] + 1.0 * (found["kept"] - 0.05))
    assert_close(made.multiplier, (1 + 0.5 * (found["kept"].detach() - 0.05)).clamp(min=0))
    before = made.multiplier.clone()
    again = made.loss(cases[:4], random.Random(0))
    assert_close(again["loss"], again["edit"] + before * (again["kept"] - 0.05))
    made.eval()
    with torch.no_grad():
        judged_by = made.loss(cases[:4], random.Random(0))
    assert_close(judged_by["loss"], 0.1 * judged_by["edit"] + judged_by["kept"])
    assert torch.equal(judged_by["multiplier"], made.multiplier)


def test_a_multiplier_is_never_negative(lm: LanguageModel) -> None:
    made = learner(lm, constraint={"margin": 1e6}).train()
    made.loss(capital_cases()[:2], random.Random(0))
    assert float(made.multiplier) == 0.0


def test_the_margin_shrinks_when_edits_succeed_and_no_further_than_said(lm: LanguageModel) -> None:
    made = learner(lm, constraint={"margin": 0.1, "lowest": 0.07})
    for accuracy, margin in ((0.9, 0.1), (0.95, 0.08), (0.95, 0.07), (0.95, 0.07)):
        made.validated({"accuracy": accuracy})
        assert float(made.margin) == pytest.approx(margin)
    assert {"multiplier", "margin"} <= made.state_dict().keys()


def test_it_learns_to_edit(lm: LanguageModel) -> None:
    numbers = {"steps": 60, "validate_every": 20}
    cases = divided()
    editor = Ke(config(training=numbers), Background()).fit(lm, cases)
    paths = mlp_paths(lm, range(lm.layers))
    fresh = FittedKe(config(), Fit.of(lm, paths), begun(lm, paths, cases.train, config()))
    learnt, before = (judged(lm, e, cases.validation) for e in (editor, fresh))
    assert learnt["EA"].mean > 0.7 and learnt["EA"].mean > before["EA"].mean
    assert learnt["DD"].mean < 0.1
    assert editor.config.layers == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"margin": -1.0}, "margin must not be"), ({"shrink": 0.0}, r"shrink is in \(0, 1\]")],
)
def test_numbers_without_sense_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config(constraint=settings)
