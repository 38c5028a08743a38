"""SCEN: the losses as the paper writes them, an expert for each edit, neurons that tell apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors import Background
from errata.editors.memory.scen import Scen, ScenConfig
from errata.edits.memories.experts import Experts
from errata.edits.memory import memory_at
from errata.edits.stack import Stack
from errata.errors import ConfigError
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, beginnings
from errata.requests import Request
from tests.conftest import TEMPLATES
from tests.editors.memory.test_grace import FACTS, right
from tests.edits.memories.making import says

WORKING = {
    "layers": [2],
    "learning_rate": 0.2,
    "neuron_updates": 60,
    "neuron_learning_rate": 0.3,
    "loss": "hinge",
}


def scen(**settings: Any) -> Scen:
    return Scen(ScenConfig.from_dict(WORKING | settings), Background())


@pytest.fixture
def trained(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def test_the_losses_are_equations_5_to_8() -> None:
    own, seen = torch.tensor([0.9]), torch.tensor([0.2, 0.6])
    activate = math.exp(-0.9)
    silent = (math.exp(0.2 + 0.7) + math.exp(0.6 + 0.7)) / 2
    margin = (math.exp(0.2 - 0.9 + 0.3) + math.exp(0.6 - 0.9 + 0.3)) / 2

    def value(**settings: Any) -> float:
        return float(scen(**{"loss": "paper"} | settings)._loss(own, seen))

    assert value() == pytest.approx(activate + silent + margin)
    assert value(balance=0.5) == pytest.approx(activate + 0.5 * (silent + margin))
    assert value(margin=False) == pytest.approx(activate + silent)
    assert value(margin=False, disactivate=False) == pytest.approx(activate)
    assert value(loss="hinge") == pytest.approx(activate + (0.0 + 0.3) / 2 + 0.0)
    assert float(scen()._loss(own, seen[:0])) == pytest.approx(activate)


@pytest.mark.parametrize(("loss", "matter"), [("paper", True), ("reference", False)])
def test_the_constants_have_no_gradient_in_the_reference(loss: str, matter: bool) -> None:
    def slope(**constants: float) -> torch.Tensor:
        own, seen = (torch.tensor(a, requires_grad=True) for a in ([0.9], [0.2, 0.6]))
        (found,) = torch.autograd.grad(scen(loss=loss, **constants)._loss(own, seen), [seen])
        return found

    assert torch.equal(slope(), slope(alpha=2.0, beta=1.0)) is not matter


def test_every_edit_of_a_stream_is_answered_by_its_own_expert(trained: LanguageModel) -> None:
    editor, edits = scen(), []
    for fact in FACTS:
        edit = editor.edit(trained, [fact])
        edit.apply_(trained)
        edits.append(edit)
    assert right(trained, FACTS) == [True] * 4
    assert all(edit.record.notes["activation"][0] > 0.65 for edit in edits)
    Stack(edits).undo_(trained)
    # Kept whole, an expert is what training made of the matrix.
    whole = scen(rank=None).edit(trained, FACTS[:1])
    assert whole.record.notes["error of the rank"] == [0.0]
    assert whole.nbytes > edits[0].nbytes


def test_neurons_are_trained_against_all_earlier_prompts(trained: LanguageModel) -> None:
    alone = scen().edit(trained, FACTS[1:2])
    with scen().edit(trained, FACTS[:1]).applied(trained):
        after = scen().edit(trained, FACTS[1:2])
        again = scen().edit(trained, FACTS[:1])  # the same prompt is no example against itself
    assert alone.record.notes["largest activation by earlier prompts"] == [0.0]
    assert not torch.equal(after.tensors["neurons"], alone.tensors["neurons"])
    for name in "left", "right", "prompts":  # experts know nothing of each other
        assert torch.equal(after.tensors[name], alone.tensors[name])
    assert again.record.notes["largest activation by earlier prompts"] == [0.0]


def test_one_edit_of_several_requests_is_the_stream_of_them(trained: LanguageModel) -> None:
    together = scen().edit(trained, FACTS[:3])
    edits = []
    for fact in FACTS[:3]:
        edits.append(scen().edit(trained, [fact]))
        edits[-1].apply_(trained)
    Stack(edits).undo_(trained)
    for name, tensor in together.tensors.items():
        each = torch.cat([edit.tensors[name] for edit in edits])
        torch.testing.assert_close(tensor, each, rtol=1e-3, atol=1e-4)


def test_several_requests_may_share_an_expert(trained: LanguageModel) -> None:
    edit = scen(edits_per_expert=2, updates=20).edit(trained, FACTS[:3])
    assert edit.serves == ((0, 1), (2,))
    assert edit.tensors["neurons"].shape[0] == 2
    with edit.applied(trained):
        memory = memory_at(trained, "experts", edit.path, edit.settings)
        assert isinstance(memory, Experts)
        assert len(memory.prompts_without([])) == 3
        assert len(memory.prompts_without([FACTS[1].text])) == 2
        assert right(trained, FACTS[:2]) == [True] * 2


@pytest.mark.parametrize("matrix", ["attention_out", "mlp_in", "mlp_out"])
def test_each_matrix_may_have_experts(tiny_lm: LanguageModel, matrix: str) -> None:
    fact = Request(TEMPLATES[0], "France", "Rome")
    before = says(tiny_lm, [fact.text])
    edit = scen(matrix=matrix).edit(tiny_lm, [fact])
    with edit.applied(tiny_lm):
        assert not torch.equal(says(tiny_lm, [fact.text]), before)
    assert torch.equal(says(tiny_lm, [fact.text]), before)


def test_an_expert_of_llamas_shape_is_small() -> None:
    d_out, d_in, rank = 4096, 11008, ScenConfig().rank
    assert rank is not None
    whole = d_out * d_in
    kept = rank * (d_out + d_in) + 2 * d_in  # the factors, the neuron and its prompt's input
    assert whole / kept > 50


def test_one_block_alone(trained: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="in one block"):
        scen(layers=[1, 2]).edit(trained, FACTS[:1])
    with pytest.raises(ConfigError, match="threshold must be between"):
        scen(threshold=1.5)


def test_how_an_answer_begins_is_how_its_expert_writes_it(trained: LanguageModel) -> None:
    """Prompts of unlike length, some with an expert: one pass over them and the answers tells."""
    prompts = [fact.text for fact in FACTS] + ["Rome is the capital of", "Once again: Peru"]
    examples = [Example(prompt, "Madrid") for prompt in prompts]
    with scen().edit(trained, FACTS[:2]).applied(trained):
        written = [text.strip() for text in complete(trained, prompts, new_tokens=6)]
        with torch.no_grad():
            answers = answer_logits(trained, examples, following=True)
        begun = [one.text.strip() for one in beginnings(trained, examples, answers)]
    assert all(begun)
    assert [text[: len(b)] for text, b in zip(written, begun, strict=True)] == begun
