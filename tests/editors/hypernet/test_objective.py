"""The outer loss against weights that are really changed, case by case."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close

from errata.editors.hypernet.gradients import Factors
from errata.editors.hypernet.objective import ObjectiveConfig, Questions, outer_loss
from errata.editors.wordings import neighbours, wordings
from errata.errors import ConfigError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits
from errata.lm.weights import weight_out_in
from errata.requests import Case, Probe, Request
from tests.editors.hypernet.models import mlps
from tests.lm.families import tiny_lm


def cases(lm: LanguageModel) -> list[Case]:
    first, second = ("supports", "refutes") if lm.task == "classify" else ("the North Sea", "Rome")
    return [
        Case(
            Request("{} flows to", "The Nile", first),
            paraphrases=("Rivers such as The Nile go to", "To where? The Nile:"),
            neighbours=(Probe("The Rhine flows to", second), Probe("Vienna lies on", first)),
        ),
        Case(Request("The capital of {} is", "France", second)),  # nothing that must stay
    ]


def changes(lm: LanguageModel, owners: int) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path in mlps(lm, 1):
        d_out, d_in = weight_out_in(lm.module(path)).shape
        left = 0.1 * torch.randn(owners, d_out, 2, generator=generator)
        found[path] = (left, torch.randn(owners, 2, d_in, generator=generator))
    return found


@pytest.mark.parametrize("kind", ["gpt2", "bert-labels", "t5", "roberta"])
def test_it_is_the_loss_of_models_that_were_really_edited(kind: str) -> None:
    lm = tiny_lm(kind)
    config = ObjectiveConfig(wordings=3, neighbours=2)
    asked = Questions.of(cases(lm), random.Random(0), config)
    assert asked.wanted_of == [0, 0, 0, 1] and asked.kept_of == [0, 0]
    with torch.no_grad():
        found = outer_loss(lm, asked, changes(lm, 2), config)
    nll, kl, hits = [], [], []
    before = [answer_logits(lm, [one]).logits.log_softmax(-1).detach() for one in asked.kept]
    for owner in (0, 1):
        weights = {path: weight_out_in(lm.module(path)) for path in changes(lm, 2)}
        originals = {path: weight.clone() for path, weight in weights.items()}
        for path, (left, right) in changes(lm, 2).items():
            weights[path] += left[owner] @ right[owner]
        for one, number in zip(asked.wanted, asked.wanted_of, strict=True):
            if number == owner:
                with torch.no_grad():
                    answers = answer_logits(lm, [one])
                nll.append(float(answers.losses()))
                hits.append(float(answers.right()))
        for one, number, old in zip(asked.kept, asked.kept_of, before, strict=True):
            if number == owner:
                new = answer_logits(lm, [one]).logits.log_softmax(-1).detach()
                kl.append(float((old.exp() * (old - new)).sum(-1).mean()))
        for path, original in originals.items():
            weights[path].copy_(original)
    assert float(found["edit"]) == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    # A small sum of differences of logarithms near 5, each rounded by some 1e-7.
    assert float(found["kept"]) == pytest.approx(sum(kl) / len(kl), rel=1e-4, abs=1e-6)
    assert float(found["kept"]) > 1e-4
    assert float(found["accuracy"]) == pytest.approx(sum(hits) / len(hits))
    assert_close(found["loss"], 0.1 * found["edit"] + found["kept"])


def test_without_a_change_nothing_diverges() -> None:
    lm = tiny_lm("gpt2")
    asked = Questions.of(cases(lm), random.Random(0), ObjectiveConfig())
    nothing = {path: (0 * left, right) for path, (left, right) in changes(lm, 2).items()}
    found = outer_loss(lm, asked, nothing, ObjectiveConfig())["kept"].detach()
    assert float(found) == pytest.approx(0, abs=1e-6)


def test_cases_without_neighbours_have_nothing_to_keep() -> None:
    lm = tiny_lm("gpt2")
    asked = Questions.of(cases(lm)[1:], random.Random(0), ObjectiveConfig())
    with torch.no_grad():
        found = outer_loss(lm, asked, changes(lm, 1), ObjectiveConfig())
    assert float(found["kept"]) == 0 and float(found["edit"]) > 0


def test_weights_get_no_gradient() -> None:
    lm = tiny_lm("gpt2")
    factors = {path: (a.requires_grad_(), b) for path, (a, b) in changes(lm, 2).items()}
    asked = Questions.of(cases(lm), random.Random(0), ObjectiveConfig())
    torch.autograd.backward(outer_loss(lm, asked, factors, ObjectiveConfig())["loss"])
    assert all(parameter.grad is None for parameter in lm.network.parameters())
    assert all(left.grad is not None and left.grad.norm() > 0 for left, _ in factors.values())


def test_what_is_asked_is_drawn_from_the_case() -> None:
    case = cases(tiny_lm("gpt2"))[0]
    assert wordings(case)[0] == Example("The Nile flows to", "the North Sea")
    assert len(wordings(case)) == 3 and len(neighbours(case)) == 2
    seen = {
        Questions.of([case], random.Random(seed), ObjectiveConfig()).wanted[0].prompt
        for seed in range(30)
    }
    assert seen == {one.prompt for one in wordings(case)}
    nothing = Questions.of([case], random.Random(0), ObjectiveConfig(kept=0.0))
    assert not nothing.kept


@pytest.mark.parametrize(
    "values", [{"edit": -1.0}, {"kept": float("inf")}, {"wordings": 0}, {"neighbours": 0}]
)
def test_numbers_that_teach_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ObjectiveConfig.from_dict(values)
