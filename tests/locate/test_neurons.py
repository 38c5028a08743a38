"""Knowledge neurons against the plain computation, on weights, and on facts that we planted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.errors import (
    ConfigError,
    HookError,
    NotFiniteError,
    RequestError,
    TokenizationError,
)
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.lm.tokens import encode_answers, encode_masked, pad
from errata.lm.weights import weight_out_in
from errata.locate.neurons import (
    Effect,
    Neuron,
    Neurons,
    amplified,
    attribution,
    check,
    coarse_neurons,
    knowledge_neurons,
    refined,
    suppressed,
)
from tests.lm.families import tiny_lm
from tests.locate.planted import FACTS, LAYERS, STRANGER, neuron, planted

DECODERS = ("gpt2", "llama", "opt", "gemma2")
ENCODERS = ("bert", "roberta", "distilbert")
PROMPT, ANSWER = "The capital of France is", "the North Sea"
ASK = "the birthplace of {}"
"""Ends with the subject, where the planted neurons fire."""
KNOWN = "Ada Bell"


def double(family: str) -> LanguageModel:
    return tiny_lm(family, dtype=torch.float64)


def predicted(lm: LanguageModel) -> list[tuple[list[int], int, int]]:
    """For each token of the answer: the tokens that are read, where it is predicted, the token."""
    if lm.kind == "decoder":
        [text] = encode_answers(lm, [PROMPT], [ANSWER])
        ends = range(text.prompt_length, len(text.ids))
        return [(text.ids[:end], end - 1, text.ids[end]) for end in ends]
    [masked] = encode_masked(lm, [PROMPT], [ANSWER])
    return [(masked.ids, masked.first + i, token) for i, token in enumerate(masked.answer)]


def probability(
    lm: LanguageModel, ids: list[int], place: int, token: int, layer: int, put: Tensor | None
) -> tuple[Tensor, Tensor]:
    """P(token) by one full pass with `put` as block `layer`'s activations; and those it had."""
    kept: list[Tensor] = []

    def hook(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        kept.append(args[0].detach().reshape(len(ids), -1)[place])  # flat in OPT
        if put is None:
            return args
        rows = [*args[0].reshape(len(ids), -1)]
        return (torch.stack([*rows[:place], put, *rows[place + 1 :]]).reshape(args[0].shape),)

    handle = lm.mlp_out(layer).register_forward_pre_hook(hook)
    batch = pad(lm, [ids])
    try:
        logits = lm.network(input_ids=batch.ids, attention_mask=batch.mask).logits[0, place]
    finally:
        handle.remove()
    return logits.softmax(dim=0)[token], kept[0]


def plain(lm: LanguageModel, steps: int) -> Tensor:
    """The formula, one full pass for each token, layer and step."""
    asked = predicted(lm)
    scores = []
    for layer in range(lm.layers):
        total = torch.zeros(())
        for ids, place, token in asked:
            whole = probability(lm, ids, place, token, layer, None)[1]
            for j in range(1, steps + 1):
                point = (whole * j / steps).requires_grad_()
                p, _ = probability(lm, ids, place, token, layer, point)
                total = total + whole / steps * torch.autograd.grad(p, point)[0]
        scores.append(total / len(asked))
    return torch.stack(scores).float()


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_attribution_is_the_riemann_sum(family: str) -> None:
    lm = double(family)
    assert len(predicted(lm)) > 1
    found = attribution(lm, PROMPT, ANSWER, steps=2)
    assert found.shape == (lm.layers, weight_out_in(lm.mlp_out(0)).shape[1])
    assert_close(found.float(), plain(lm, 2), rtol=1e-5, atol=1e-9)
    assert bool((found != 0).any(dim=1).all())


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_layers_attributions_add_up_to_what_it_does(family: str) -> None:
    """Completeness: their sum tends to P(a) - P(0), its error falling with the number of steps."""
    lm = double(family)
    whole = torch.zeros(lm.layers, dtype=torch.float64)
    asked = predicted(lm)
    with torch.no_grad():
        for layer in range(lm.layers):
            for ids, place, token in asked:
                p, a = probability(lm, ids, place, token, layer, None)
                zero, _ = probability(lm, ids, place, token, layer, torch.zeros_like(a))
                whole[layer] += (p - zero) / len(asked)

    def error(steps: int) -> float:
        found = attribution(lm, PROMPT, ANSWER, steps=steps).double().sum(dim=1)
        return float((found - whole).abs().max() / whole.abs().max())

    assert error(200) < 0.02
    assert error(200) < 0.2 * error(20)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_batching_changes_nothing(family: str) -> None:
    lm = double(family)
    together, alone = (attribution(lm, PROMPT, ANSWER, batch_tokens=n) for n in (10**6, 1))
    assert_close(together, alone)


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_the_planted_neuron_is_found(layer: int) -> None:
    lm = planted(layer)
    for subject, answer in FACTS.items():
        found = knowledge_neurons(lm, [ASK.format(subject), f"of {subject}"], answer)
        assert [(n.layer, n.index) for n in found] == [(layer, neuron(subject))]
        assert found.coarse == (1, 1)
        assert found.found[0].score > 0.05


def test_the_planted_neuron_holds_its_fact_and_no_other() -> None:
    lm = planted(2)
    with torch.no_grad():
        weight_out_in(lm.mlp_out(2)).mul_(0.05)  # facts less sure, so that they can become surer
        weight_out_in(lm.head).mul_(0.5)
    found = knowledge_neurons(lm, [ASK.format(KNOWN)], FACTS[KNOWN])
    asks = {s: [Example(t.format(s), a) for t in (ASK, ASK + " is")] for s, a in FACTS.items()}
    facts = asks.pop(KNOWN)
    effect = check(lm, found, facts, [example for some in asks.values() for example in some])
    ignorant = [Example(t.format(STRANGER), FACTS[KNOWN]) for t in (ASK, ASK + " is")]
    unknown = [reaction.before for reaction in check(lm, [], ignorant).facts]
    # Also where the answer is predicted after the neuron's own position.
    for reaction, chance in zip(effect.facts, unknown, strict=True):
        assert reaction.before > 5 * chance
        assert reaction.suppressed == pytest.approx(chance)
        assert reaction.amplified > 1.4 * reaction.before
    for reaction in effect.others:
        assert reaction.before == reaction.suppressed == reaction.amplified > 5 * unknown[0]
    assert [(r.prompt, r.answer) for r in effect.facts] == [(e.prompt, e.answer) for e in facts]
    assert len(effect.others) == 8 and effect.factor == 2


@pytest.mark.parametrize("family", DECODERS + ENCODERS + ("t5", "bert-labels"))
@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_scaling_neurons_is_scaling_columns(family: str, factor: float) -> None:
    lm = double(family)
    answer = "supports" if lm.labels else ANSWER
    examples = [Example(PROMPT, answer), Example("Vienna", answer)]
    some = [Neuron(0, 3, 0.0), Neuron(2, 1, 0.0), Neuron(2, 5, 0.0)]
    with torch.no_grad():
        before = losses(lm, examples)
        with amplified(lm, some, factor):
            scaled = losses(lm, examples)
        assert torch.equal(losses(lm, examples), before)
        if factor == 0:
            with suppressed(lm, some):
                assert torch.equal(losses(lm, examples), scaled)
        for one in some:
            weight_out_in(lm.mlp_out(one.layer))[:, one.index] *= factor
        assert_close(losses(lm, examples), scaled)
    assert not torch.allclose(scaled, before)


def test_contexts_clean_up_and_speak_up(tiny_lm: LanguageModel) -> None:
    some = [Neuron(1, 3, 0.0)]
    with pytest.raises(KeyError), suppressed(tiny_lm, some):
        raise KeyError
    with pytest.raises(HookError, match="did not run"), suppressed(tiny_lm, some):
        pass
    for module in tiny_lm.network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_model_stays_as_it_is(family: str) -> None:
    lm = tiny_lm(family)
    next(lm.network.parameters()).requires_grad_(False)
    asking = [parameter.requires_grad for parameter in lm.network.parameters()]
    before = {name: value.clone() for name, value in lm.network.state_dict().items()}
    found = knowledge_neurons(lm, [PROMPT, "Vienna is"], ANSWER, steps=2)
    check(lm, found, [Example(PROMPT, ANSWER)])
    assert [parameter.requires_grad for parameter in lm.network.parameters()] == asking
    assert all(parameter.grad is None for parameter in lm.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lm.network.state_dict().items())
    for module in lm.network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_found_neurons_are_those_that_refinement_keeps(tiny_gpt2: LanguageModel) -> None:
    prompts = [PROMPT, "France has its capital in", "Paris is"]
    found = knowledge_neurons(tiny_gpt2, prompts, "Paris", threshold=0.1)
    scores = [attribution(tiny_gpt2, prompt, "Paris") for prompt in prompts]
    coarse = [coarse_neurons(one, 0.1) for one in scores]
    assert found.coarse == tuple(map(len, coarse))
    assert {(n.layer, n.index) for n in found} == set(refined(coarse, 0.7)[0])
    for one in found:
        mean = sum(float(s[one.layer, one.index]) for s in scores) / len(scores)
        assert one.score == pytest.approx(mean, rel=1e-4)
    values = [one.score for one in found]
    assert values == sorted(values, reverse=True)


def test_coarse_neurons_reach_a_share_of_the_largest() -> None:
    scores = torch.tensor([[0.5, 0.1, -2.0], [0.09, 0.2, 0.0]])
    assert coarse_neurons(scores, 0.2) == {(0, 0), (0, 1), (1, 1)}
    assert coarse_neurons(scores, 1.0) == {(0, 0)}
    assert coarse_neurons(-scores.abs(), 0.2) == set()


def bags(*rows: Sequence[int]) -> list[set[tuple[int, int]]]:
    return [{(0, i) for i in row} for row in rows]


def test_refinement_wants_more_than_a_share_of_the_prompts() -> None:
    ten = bags(*([0, 1, 2] if i < 8 else [0, 1] if i < 9 else [0] for i in range(10)))
    assert refined(ten, 0.7) == ([(0, 0), (0, 1), (0, 2)], 0.7)
    assert refined(ten, 0.8) == ([(0, 0), (0, 1)], 0.8)  # 8 of 10 are not more than 0.8


def test_refinement_moves_the_share() -> None:
    # Too few: 0.7, 0.65, 0.6, ... until 1 of 2 prompts is more than the share.
    assert refined(bags([0, 1], [0, 2]), 0.7) == ([(0, 0), (0, 1), (0, 2)], 0.45)
    few = bags([0, 1], [0, 1], [0, 2])
    assert refined(few, 0.7) == ([(0, 0), (0, 1)], 0.65)
    # Too many: 8 of 10 prompts hold six neurons, 9 of 10 three.
    many = bags(*([*range(6)] if i < 8 else [*range(3)] if i < 9 else [] for i in range(10)))
    assert refined(many, 0.7) == ([(0, 0), (0, 1), (0, 2)], 0.8)


def test_refinement_gives_up_after_six_moves() -> None:
    assert refined(bags([0], [1], [2], [3], [4]), 0.7) == ([], 0.4)
    # All of many neurons in all prompts: no share below 1 leaves fewer.
    found, share = refined(bags(range(9), range(9)), 0.7)
    assert len(found) == 9 and share == 0.95


@pytest.mark.parametrize(
    "family, settings, wrong",
    [
        ("gpt2", {"steps": 0}, "at least one step"),
        ("gpt2", {"threshold": 0.0}, "above 0"),
        ("gpt2", {"threshold": 1.5}, "above 0"),
        ("gpt2", {"share": 1.0}, "below 1"),
        ("t5", {}, "masked encoder"),
        ("bert-labels", {}, "masked encoder"),
    ],
)
def test_settings_and_models_that_cannot_be(
    family: str, settings: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        knowledge_neurons(tiny_lm(family), [PROMPT], ANSWER, **settings)


def test_nothing_to_ask(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(RequestError, match="no prompt"):
        knowledge_neurons(tiny_gpt2, [], ANSWER)
    with pytest.raises(RequestError, match="no fact"):
        check(tiny_gpt2, [], [])
    with pytest.raises(TokenizationError, match="no token of its own"):
        attribution(tiny_gpt2, PROMPT, " ")


@pytest.mark.parametrize("one", [Neuron(9, 0, 0.0), Neuron(0, 999, 0.0), Neuron(0, -1, 0.0)])
def test_neurons_of_another_model(tiny_gpt2: LanguageModel, one: Neuron) -> None:
    with pytest.raises(ConfigError, match="another model"), suppressed(tiny_gpt2, [one]):
        pass


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_damaged_weight_is_named(family: str) -> None:
    lm = tiny_lm(family)
    with torch.no_grad():
        weight_out_in(lm.mlp_out(1))[0, 0] = float("nan")
    asks: list[Callable[[], object]] = [
        lambda: attribution(lm, PROMPT, ANSWER),
        lambda: check(lm, [], [Example(PROMPT, ANSWER)]),
    ]
    for ask in asks:
        with pytest.raises(NotFiniteError, match=lm.mlp_out_path(1)):
            ask()


def test_json_round_trip_is_exact(tiny_gpt2: LanguageModel) -> None:
    found = knowledge_neurons(tiny_gpt2, [PROMPT, "Paris is"], ANSWER, threshold=0.05)
    assert found.found
    assert Neurons.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    effect = check(tiny_gpt2, found, [Example(PROMPT, ANSWER)], [Example("Vienna", "Rome")])
    assert Effect.from_dict(json.loads(json.dumps(effect.to_dict()))) == effect
    assert effect.facts[0].suppressed != effect.facts[0].before


def test_progress_counts_prompts(tiny_gpt2: LanguageModel) -> None:
    told: list[tuple[str, int, int]] = []
    knowledge_neurons(
        tiny_gpt2, [PROMPT, "Vienna"], "Rome", steps=1, progress=lambda *step: told.append(step)
    )
    assert told == [("attributions", 1, 2), ("attributions", 2, 2)]
