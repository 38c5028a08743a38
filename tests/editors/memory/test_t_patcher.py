"""T-Patcher: one neuron for each wrong token, silent elsewhere, gone when it is taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.algebra.neurons import Neurons
from errata.editors.background import Background
from errata.editors.memory.patches import (
    PatchConfig,
    activation_loss,
    first_neurons,
    memory_loss,
)
from errata.editors.memory.t_patcher import Ordinary, TPatcher, TPatcherConfig
from errata.edits.file import load_edit
from errata.edits.memory import MemoryEdit
from errata.errors import ConfigError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, losses
from errata.requests import Request
from tests.conftest import CAPITALS, SENTENCES, TEMPLATES, statements
from tests.editors.hypernet.models import KINDS, some
from tests.lm.families import tiny_lm

QUICK: dict[str, Any] = {
    "memory_tokens": 400,
    "patch": {"updates": 60, "check_from": 20, "learning_rate": 0.3, "memory": 1.0},
}


def patcher(**config: Any) -> TPatcher:
    text = Background(corpus=[*SENTENCES, *statements()])
    return TPatcher(TPatcherConfig.from_dict(QUICK | config), text)


def request(country: str, capital: str) -> Request:
    return Request(TEMPLATES[0], country, capital)


@torch.no_grad()
def says(lm: LanguageModel, texts: list[str]) -> Tensor:
    return losses(lm, [Example(text, "Rome") for text in texts])


def test_a_neuron_begins_driven_to_one_by_its_own_token() -> None:
    queries = torch.randn(4, 16)
    neurons = first_neurons(queries, 8, amplify=10.0, seed=3)
    assert_close(neurons.drives(queries).diagonal(), torch.ones(4))
    assert neurons.values.std() > 5
    again = first_neurons(queries, 8, amplify=10.0, seed=3)
    assert torch.equal(neurons.values, again.values)


def test_the_losses_are_those_of_the_paper() -> None:
    config = PatchConfig(act_margin=0.5, loudest=2, loudest_own=1)
    own, drives = torch.tensor([1.0, 2.0]), torch.tensor([[-4.0, -1.0], [-2.0, -5.0], [0.0, -3.0]])
    assert_close(activation_loss(own, config), torch.tensor(0.5 - 1.0).exp())
    absolute = torch.tensor([3.0, 2.0]).exp().mean()  # drives 0 and -1, from beta = -3 on
    beside = torch.tensor([0.0 - 1 + 3, -2.0 - 1 + 3]).exp().mean()  # the others: -1 - 2 + 3 = 0
    neurons = Neurons(torch.eye(2), torch.zeros(2), torch.zeros(2, 1))
    assert_close(memory_loss(neurons, drives, own, config), absolute + beside)


def test_gradients_of_silence_are_those_of_the_whole_text() -> None:
    config = PatchConfig(loudest=6)
    old, own = torch.randn(40, 5), torch.randn(3, requires_grad=True)
    neurons = Neurons(torch.randn(3, 5, requires_grad=True), torch.zeros(3), torch.zeros(3, 1))
    whole = sum(
        (drives.flatten().sort(descending=True).values[:6] - margin).exp().mean()
        for drives, margin in (
            (neurons.drives(old), config.beta),
            (neurons.drives(old) - own, config.gamma),
        )
    )
    assert isinstance(whole, Tensor)
    for mine, theirs in zip(
        torch.autograd.grad(memory_loss(neurons, old, own, config), [neurons.keys, own]),
        torch.autograd.grad(whole, [neurons.keys, own]),
        strict=True,
    ):
        assert_close(mine, theirs)


def test_neurons_add_what_the_formula_says() -> None:
    neurons = Neurons(torch.randn(3, 5), torch.randn(3), torch.randn(3, 4))
    x = torch.randn(2, 7, 5)
    wanted = sum(
        torch.relu(x @ key + bias)[..., None] * value
        for key, bias, value in zip(neurons.keys, neurons.biases, neurons.values, strict=True)
    )
    assert_close(neurons(x, torch.relu), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_patched(kind: str) -> None:
    lm = tiny_lm(kind)
    example = some(lm)[0]
    edit = patcher(memory_tokens=100).edit(lm, [Request("{}", example.prompt, example.answer)])
    with torch.no_grad():
        before = answer_logits(lm, [example])
        with edit.applied(lm):
            after = answer_logits(lm, [example])
        again = answer_logits(lm, [example])
    wrong = int((before.logits.argmax(-1) != before.wanted).sum())
    assert len(edit.tensors["keys"]) == min(5, wrong)
    assert after.losses() < before.losses() or not wrong
    assert torch.equal(before.logits, again.logits)


def test_the_training_sees_what_the_applied_edit_does(tiny_lm: LanguageModel) -> None:
    """... of a gated MLP too: the loss that the notes tell is that of the model with the edit."""
    wanted = request("Italy", "the North Sea")
    edit = patcher().edit(tiny_lm, [wanted])
    with edit.applied(tiny_lm), torch.no_grad():
        found = losses(tiny_lm, [Example(wanted.text, wanted.target)])
    assert_close(float(found), edit.record.notes["loss"][0], rtol=1e-4, atol=1e-4)


def test_an_answer_that_comes_already_needs_no_neuron(trained_folder: Any) -> None:
    lm = LanguageModel.load(trained_folder)
    edit = patcher().edit(lm, [request("France", "Paris"), request("Italy", "Madrid")])
    assert edit.record.notes["neurons"][0] == 0
    assert edit.record.notes["neurons"][1] == len(edit.tensors["keys"]) > 0
    assert edit.record.notes["right"] == [True, True]


def test_an_edit_may_have_nothing_to_do(trained_folder: Any, tmp_path: Path) -> None:
    """As in a stream, where earlier edits may have taught the answer."""
    lm = LanguageModel.load(trained_folder)
    known = request("France", CAPITALS["France"])
    edit = patcher().edit(lm, [known])
    assert edit.nbytes == 0 and edit.requests == (known,)
    edit.save(tmp_path / "e")
    texts = [known.text, *SENTENCES[:3]]
    before = says(lm, texts)
    with load_edit(tmp_path / "e").applied(lm):
        assert edit.is_applied(lm)
        assert torch.equal(says(lm, texts), before)


def test_a_stream_of_patches_stays_apart(trained_folder: Any, tmp_path: Any) -> None:
    """Each edit takes, leaves other texts, and can be taken back from between the others."""
    lm = LanguageModel.load(trained_folder)
    texts = [TEMPLATES[0].format(country) for country in CAPITALS]
    untouched = says(lm, texts)
    editor = patcher(patch={"updates": 150, "check_from": 50, "learning_rate": 0.1})
    facts = [request("France", "Madrid"), request("Peru", "Cairo"), request("Japan", "Rome")]
    edits: list[MemoryEdit] = []
    for fact in facts:
        edits.append(editor.edit(lm, [fact]))
        edits[-1].apply_(lm)
    with torch.no_grad():
        assert answer_logits(lm, [Example(f.text, f.target) for f in facts]).right().all()
        others = [
            Example(TEMPLATES[0].format(country), capital)
            for country, capital in CAPITALS.items()
            if country not in ("France", "Peru", "Japan")
        ]
        assert answer_logits(lm, others).right().all()
    edits[1].undo_(lm)
    without = says(lm, texts)
    for edit in edits[::2]:
        edit.undo_(lm)
    assert torch.equal(says(lm, texts), untouched)
    for number in (0, 2):
        edits[number].save(tmp_path / f"{number}.safetensors")
        load_edit(tmp_path / f"{number}.safetensors").apply_(lm)
    assert torch.equal(says(lm, texts), without)


def test_texts_about_the_subject_are_no_ordinary_text(tiny_gpt2: LanguageModel) -> None:
    text = Background(corpus=["The capital of Peru is Lima.", "Rome lies in Italy."])
    found = Ordinary.of(tiny_gpt2, 3, text, 100)
    apart = found.apart_from(" peru ")
    assert 0 < len(apart) < len(found.states)
    assert torch.equal(apart, found.states[found.owner == 1])


def test_several_blocks_are_refused(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="one block's MLP"):
        patcher(layers=[1, 2]).prepare(tiny_gpt2)


def test_an_encoder_needs_ordinary_text() -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        TPatcher(TPatcherConfig(), Background()).prepare(tiny_lm("bert"))
