"""Saliency against the plain computation: one backward pass for each example, weight.grad kept."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import errata.locate.saliency as room
from errata.errors import ConfigError, NotFiniteError, RequestError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.locate.saliency import Saliency, parameter_saliency, saliency
from tests.lm.families import tiny_lm
from tests.locate.planted import FACTS, LAYERS, PROMPT, STRANGER, planted

EVERY_KIND = (
    "gpt2",
    "llama",
    "opt",
    "phi3",
    "bert",
    "roberta",
    "distilbert",
    "bert-labels",
    "t5",
    "t5-gated",
    "bart",
)


def double(family: str = "gpt2") -> LanguageModel:
    return tiny_lm(family, dtype=torch.float64)


def some(lm: LanguageModel) -> list[Example]:
    """Prompts of unlike length, with answers of unlike length or labels."""
    if lm.task == "classify":
        answers = ["supports", "refutes", "2", "supports"]
    else:
        answers = ["Paris", "the North Sea", "Rome", "a river"]
    prompts = ["The capital of France is", "Rivers flow to", "Vienna", "You and I walk to the"]
    return [Example(p, a) for p, a in zip(prompts, answers, strict=True)]


def plain(lm: LanguageModel, examples: Sequence[Example], path: str) -> Tensor:
    """(n, d_out, d_in) every example's |gradient| of one weight."""
    module = lm.module(path)
    found = []
    for example in examples:
        lm.network.zero_grad(set_to_none=True)
        torch.autograd.backward(losses(lm, [example]).sum())
        grad = module.weight.grad
        assert isinstance(grad, Tensor)
        found.append((grad.T if isinstance(module, Conv1D) else grad).abs().clone())
    lm.network.zero_grad(set_to_none=True)
    return torch.stack(found)


@pytest.mark.parametrize("family", EVERY_KIND)
def test_it_is_the_mean_of_absolute_gradients(family: str) -> None:
    lm = double(family)
    examples = some(lm)
    found = saliency(lm, examples)
    assert [m.layer for m in found.modules] == sorted([*range(lm.layers)] * 3)
    sums, counts = np.zeros(lm.layers), np.zeros(lm.layers)
    for module in found.modules:
        gradients = plain(lm, examples, module.path)
        assert module.naive == pytest.approx(float(gradients.mean()), rel=1e-6)
        assert module.naive > 0
        assert module.parameters == gradients[0].numel()
        sums[module.layer] += float(gradients.mean(dim=0).sum())
        counts[module.layer] += gradients[0].numel()
    assert found.layers == pytest.approx(sums / counts, rel=1e-6)
    assert len(found.layers) == lm.layers


def test_it_holds_in_single_precision_too(tiny_lm: LanguageModel) -> None:
    examples = some(tiny_lm)
    for module in saliency(tiny_lm, examples, modules="mlp").modules:
        expected = float(plain(tiny_lm, examples, module.path).mean())
        assert module.naive == pytest.approx(expected, rel=1e-5)


def test_a_narrow_dtype_is_accumulated_in_a_wide_one() -> None:
    exact = saliency(double(), some(double()))
    narrow = saliency(tiny_lm("gpt2", dtype=torch.bfloat16), some(double()))
    assert narrow.layers == pytest.approx(exact.layers, rel=0.05)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "t5"])
def test_parameters_and_columns(family: str) -> None:
    """Equations 2 to 4: columns average parameters, a matrix averages columns."""
    lm = double(family)
    examples = some(lm)
    module = saliency(lm, examples).modules[-1]
    parameters = parameter_saliency(lm, examples, module.path)
    assert_close(parameters, plain(lm, examples, module.path).mean(dim=0))
    columns = parameters.mean(dim=0)
    assert len(columns) == parameters.shape[1]
    assert float(columns.mean()) == pytest.approx(module.naive, rel=1e-9)


def test_mlp_alone_leaves_attention_out() -> None:
    lm = double()
    found, everything = (saliency(lm, some(lm), modules=which) for which in ("mlp", "all"))
    assert {m.path for m in found.modules} == {
        path for i in range(lm.layers) for path in (lm.mlp_in_path(i), lm.mlp_out_path(i))
    }
    others = {m.path for m in everything.modules} - {m.path for m in found.modules}
    assert others == {lm.attention_out_path(i) for i in range(lm.layers)}
    assert found.layers != everything.layers


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_batching_changes_nothing(family: str) -> None:
    lm = double(family)
    together, alone = (saliency(lm, some(lm), batch_tokens=n) for n in (4096, 1))
    assert together.layers == pytest.approx(alone.layers, rel=1e-9)


def test_a_set_against_itself_is_nothing_special() -> None:
    lm = double()
    found = saliency(lm, some(lm), neutral=some(lm))
    assert found.standardised is not None
    assert found.standardised == pytest.approx([0.0] * lm.layers, abs=1e-9)
    assert [m.standardised for m in found.modules] == pytest.approx(
        [0.0] * len(found.modules), abs=1e-9
    )
    assert (found.examples, found.neutral) == (4, 4)


def test_standardised_is_the_distance_in_standard_deviations() -> None:
    lm = double()
    examples, neutral = some(lm)[:1], some(lm)[1:]
    found = saliency(lm, examples, neutral=neutral)
    values, references = np.zeros((1, lm.layers)), np.zeros((3, lm.layers))
    counts = np.zeros(lm.layers)
    for module in found.modules:
        s = plain(lm, examples, module.path).mean(dim=(1, 2)).numpy()
        r = plain(lm, neutral, module.path).mean(dim=(1, 2)).numpy()
        assert module.standardised == pytest.approx((s.mean() - r.mean()) / r.std(ddof=1))
        values[:, module.layer] += s * module.parameters
        references[:, module.layer] += r * module.parameters
        counts[module.layer] += module.parameters
    values, references = values / counts, references / counts
    expected = (values.mean(0) - references.mean(0)) / references.std(0, ddof=1)
    assert found.standardised == pytest.approx(expected)


def test_neutral_examples_all_alike_divide_by_one() -> None:
    lm = double()
    one, other = some(lm)[:2]
    found = saliency(lm, [one], neutral=[other, other])
    naive = saliency(lm, [other])
    assert found.standardised is not None
    expected = np.array(found.layers) - np.array(naive.layers)
    assert found.standardised == pytest.approx(expected, rel=1e-6)


def test_scaling_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = double()
    examples, neutral = some(lm)[:2], some(lm)[1:]
    before = saliency(lm, examples, neutral=neutral)
    monkeypatch.setattr(room, "losses", lambda lm, some: 3 * losses(lm, some))
    after = saliency(lm, examples, neutral=neutral)
    assert after.layers == pytest.approx([3 * value for value in before.layers])
    assert after.standardised == pytest.approx(before.standardised)


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_the_planted_layer_is_found(layer: int) -> None:
    """MLPs: all others are silent, so naive must show it; standardised too, against strangers."""
    lm = planted(layer)
    facts = [Example(PROMPT.format(subject), answer) for subject, answer in FACTS.items()]
    strangers = [Example(PROMPT.format(STRANGER), answer) for answer in FACTS.values()]
    found = saliency(lm, facts, neutral=strangers, modules="mlp")
    assert found.best() == found.best(standardised=True) == (layer,)
    assert all((value > 0) == (index == layer) for index, value in enumerate(found.layers))


def test_attention_that_moves_the_fact_is_salient_too() -> None:
    lm = planted(2)
    found = saliency(lm, [Example(PROMPT.format("Ada Bell"), "Rome")])
    assert set(found.best(2)) == {2, LAYERS - 1}


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert-labels", "t5"])
def test_the_model_stays_as_it_is(family: str) -> None:
    lm = tiny_lm(family)
    for parameter in list(lm.network.parameters())[::2]:
        parameter.requires_grad_(False)
    asking = [parameter.requires_grad for parameter in lm.network.parameters()]
    before = {name: value.clone() for name, value in lm.network.state_dict().items()}
    saliency(lm, some(lm), neutral=some(lm))
    assert [parameter.requires_grad for parameter in lm.network.parameters()] == asking
    assert all(parameter.grad is None for parameter in lm.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lm.network.state_dict().items())
    for module in lm.network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_one_gradient_lives_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(family)
    alive, most, made, accumulated = 0, 0, 0, 0
    compute = room._gradient

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(delta: Tensor, x: Tensor) -> Tensor:
        nonlocal alive, most, made
        gradient = compute(delta, x)
        alive, made = alive + 1, made + 1
        most = max(most, alive)
        weakref.finalize(gradient, gone)
        return gradient

    def note(_weight: Tensor) -> None:
        nonlocal accumulated
        accumulated += 1

    monkeypatch.setattr(room, "_gradient", counted)
    weights: list[Any] = list(lm.network.parameters())
    handles = [weight.register_post_accumulate_grad_hook(note) for weight in weights]
    gc.disable()  # what is freed must be freed because nothing holds it, not by a sweep
    try:
        found = saliency(lm, some(lm))
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
    assert made == 4 * len(found.modules)
    assert (most, alive, accumulated) == (1, 0, 0)


def test_the_most_salient_layers() -> None:
    found = Saliency("m", 1, 0, (), (0.1, 0.4, 0.4, 0.9), None)
    assert found.best() == (3,)
    assert found.best(3) == (3, 1, 2)
    assert Saliency("m", 1, 2, (), (0.1, 0.4), (2.0, 1.0)).best(standardised=True) == (0,)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_layers_than_there_are(k: int) -> None:
    with pytest.raises(ConfigError, match=r"choose 1 to 4"):
        Saliency("m", 1, 0, (), (0.1, 0.4, 0.4, 0.9), None).best(k)


def test_standardised_needs_neutral_examples(tiny_gpt2: LanguageModel) -> None:
    found = saliency(tiny_gpt2, some(tiny_gpt2))
    assert found.standardised is None and found.modules[0].standardised is None
    with pytest.raises(ConfigError, match="neutral"):
        found.best(standardised=True)
    with pytest.raises(ConfigError, match="at least two"):
        saliency(tiny_gpt2, some(tiny_gpt2), neutral=some(tiny_gpt2)[:1])


def test_an_empty_editing_set(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(RequestError, match="no example"):
        saliency(tiny_gpt2, [])
    with pytest.raises(RequestError, match="no example"):
        parameter_saliency(tiny_gpt2, [], tiny_gpt2.mlp_out_path(0))


def test_a_label_that_does_not_exist() -> None:
    with pytest.raises(RequestError, match="no label 'maybe'"):
        saliency(tiny_lm("bert-labels"), [Example("Vienna lies there.", "maybe")])


@pytest.mark.parametrize("family", ["gpt2", "bert-labels", "t5"])
def test_a_damaged_weight_is_named(family: str) -> None:
    lm = tiny_lm(family)
    path = lm.mlp_out_path(1)
    with torch.no_grad():
        next(lm.module(path).parameters())[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=path):
        saliency(lm, some(lm))


def test_a_gradient_that_overflows_is_named(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steep(lm: LanguageModel, examples: Sequence[Example]) -> Tensor:
        loss = losses(lm, examples)
        return (loss - loss.detach()).sqrt()  # 0, with an infinite slope

    monkeypatch.setattr(room, "losses", steep)
    with pytest.raises(NotFiniteError, match="gradient of .*too narrow"):
        saliency(tiny_gpt2, some(tiny_gpt2))
    monkeypatch.setattr(room, "losses", lambda lm, some: losses(lm, some) / 0)
    with pytest.raises(NotFiniteError, match="a loss that is not finite"):
        saliency(tiny_gpt2, some(tiny_gpt2))


def test_json_round_trip_is_exact() -> None:
    lm = double()
    for neutral in (None, some(lm)):
        found = saliency(lm, some(lm)[:2], neutral=neutral)
        assert Saliency.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_progress_tells_both_stages(tiny_gpt2: LanguageModel) -> None:
    told: list[tuple[str, int, int]] = []
    examples = some(tiny_gpt2)
    saliency(
        tiny_gpt2,
        examples,
        neutral=examples,
        batch_tokens=1,
        progress=lambda *step: told.append(step),
    )
    assert told == [(s, i, 4) for s in ("gradients", "neutral gradients") for i in (1, 2, 3, 4)]
