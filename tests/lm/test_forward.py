"""What the lower blocks say is computed once for many passes over the same rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.lm.forward import Replay
from errata.lm.hooks import attached
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.lm.prompts import current
from tests.lm.families import OTHERS, VARIANTS, tiny_lm

TEXTS = ["The capital of France is", "Rivers flow", "Goethe wrote the letters of"]


def examples_for(lm: LanguageModel) -> list[Example]:
    answers = lm.labels[:3] if lm.labels else ["Paris", "to the sea", "Rome"]
    return [Example(text, answers[i % len(answers)]) for i, text in enumerate(TEXTS)]


def slope(lm: LanguageModel, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """The losses, and their sum's gradient in the last block."""
    found, weight = losses(lm, examples), lm.mlp_out(-1).weight
    assert isinstance(weight, Tensor)
    (gradient,) = torch.autograd.grad(found.sum(), [weight])
    return found.detach(), gradient


@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERS])
def test_a_replayed_pass_is_the_whole_pass(variant: str) -> None:
    lm = tiny_lm(variant)
    examples = examples_for(lm)
    weight: Any = lm.mlp_out(-1).weight
    calls: list[int] = []
    last = lm.layers - 1
    for layer in {0, 1, last}:
        wanted = slope(lm, examples)
        below = Replay.of(lm, layer, lambda: losses(lm, examples))
        notes = [
            lm.mlp_out(i).register_forward_hook(lambda *_, number=i: calls.append(number))
            for i in range(lm.layers)
        ]
        calls.clear()
        with below.told():
            for found, told in zip(slope(lm, examples), wanted, strict=True):
                assert_close(found, told, atol=1e-6, rtol=1e-5)
            with torch.no_grad():
                weight.mul_(0.5)
            changed = slope(lm, examples)
        assert sorted(set(calls)) == list(range(layer, lm.layers))
        for note in notes:
            note.remove()
        for found, told in zip(slope(lm, examples), changed, strict=True):
            assert_close(found, told, atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            weight.mul_(2.0)


def test_what_a_memory_below_decided_holds(tiny_gpt2: LanguageModel) -> None:
    lm, seen = tiny_gpt2, list[Any]()
    examples = examples_for(lm)

    def decide(states: Tensor, output: Tensor) -> Tensor:
        current(lm).kept["decided"] = len(states)
        return output

    def look(states: Tensor, output: Tensor) -> Tensor:
        seen.append(current(lm).kept.get("decided"))
        return output

    with attached(lm.mlp_out(0), decide), attached(lm.mlp_out(-1), look):
        below = Replay.of(lm, 1, lambda: losses(lm, examples))
        with below.told():
            losses(lm, examples)
    assert seen == [3, 3]


def test_a_pass_that_fails_leaves_the_model_as_it_was(tiny_gpt2: LanguageModel) -> None:
    lm = tiny_gpt2
    examples = examples_for(lm)
    wanted = losses(lm, examples)
    below = Replay.of(lm, 1, lambda: losses(lm, examples))
    with pytest.raises(ZeroDivisionError), below.told():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        Replay.of(lm, 1, lambda: 1 / 0)
    assert torch.equal(losses(lm, examples), wanted)
    assert not any("forward" in vars(lm.block(i)) for i in range(lm.layers))
