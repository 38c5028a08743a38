"""Experts: a row whose neuron fires runs on its expert's matrix, all others on the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.edits.edit import Record
from errata.edits.memory import MemoryEdit
from errata.edits.stack import Stack
from errata.edits.weights import WeightEdit
from errata.errors import WrongModelError
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.requests import Request
from tests.edits.memories.making import LAYER, query, says
from tests.edits.memories.test_memory import OTHERS, TEXTS, without_cache


def expert(lm: LanguageModel, text: str, seed: int, rank: int = 2) -> MemoryEdit:
    """An expert whose neuron answers to one text alone, among those of these tests."""
    path = lm.mlp_out_path(LAYER)
    own = query(lm, text, path)
    others = torch.stack([query(lm, other, path) for other in TEXTS + OTHERS if other != text])
    basis = torch.linalg.qr(others.mT).Q
    neuron = own - basis @ (basis.mT @ own)
    neuron = neuron * 4 / (neuron @ own)  # 4 before the sigmoid at its own text, 0 at the others
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = lm.d_model, len(own)
    return MemoryEdit.of(
        lm,
        "experts",
        path,
        {
            "neurons": neuron[None],
            "left": torch.randn(1, d_out, rank, generator=generator),
            "right": torch.randn(1, rank, d_in, generator=generator),
            "prompts": own[None, None],
        },
        requests=[Request("{}" + text[4:], text[:4], f"answer {seed}")],
        record=Record.of(lm, method="by hand"),
        settings={"threshold": 0.6},
    )


def weights_of(lm: LanguageModel, edit: MemoryEdit) -> WeightEdit:
    """The same change made to the weights, for all texts."""
    change = LowRank(edit.tensors["left"][0], edit.tensors["right"][0])
    return WeightEdit.of(lm, {edit.path: change}, requests=edit.requests, record=edit.record)


@pytest.fixture
def stack(tiny_lm: LanguageModel) -> Stack:
    return Stack([expert(tiny_lm, text, i, rank=1 + i % 3) for i, text in enumerate(TEXTS)])


def test_a_row_runs_on_its_experts_matrix_and_others_on_the_models(
    tiny_lm: LanguageModel, stack: Stack
) -> None:
    plain = says(tiny_lm, TEXTS + OTHERS)
    with stack.applied(tiny_lm):
        now = says(tiny_lm, TEXTS + OTHERS)
    for i, edit in enumerate(stack.edits):
        assert isinstance(edit, MemoryEdit)
        with weights_of(tiny_lm, edit).applied(tiny_lm):
            torch.testing.assert_close(now[i], says(tiny_lm, TEXTS)[i], rtol=1e-4, atol=1e-4)
        assert not torch.equal(now[i], plain[i])
    assert torch.equal(now[len(TEXTS) :], plain[len(TEXTS) :])


def test_rows_of_a_batch_have_an_expert_each(tiny_lm: LanguageModel, stack: Stack) -> None:
    asks = [Example(text, "Rome and Paris") for text in TEXTS + OTHERS]
    with stack.applied(tiny_lm), torch.no_grad():
        alone = torch.stack([losses(tiny_lm, [one])[0] for one in asks])
        torch.testing.assert_close(losses(tiny_lm, asks), alone, rtol=1e-4, atol=1e-4)


def test_forgetting_one_leaves_what_would_have_been_without_it(
    tiny_lm: LanguageModel, stack: Stack
) -> None:
    with stack.without(2).applied(tiny_lm):
        wanted = says(tiny_lm, TEXTS + OTHERS)
    with stack.applied(tiny_lm):
        says(tiny_lm, TEXTS)
        stack.edits[2].undo_(tiny_lm)
        assert torch.equal(says(tiny_lm, TEXTS + OTHERS), wanted)


def test_cached_generation_is_that_of_full_passes(tiny_lm: LanguageModel, stack: Stack) -> None:
    texts = [TEXTS[0], TEXTS[3], OTHERS[1]]  # of unlike lengths
    plain = complete(tiny_lm, texts, new_tokens=6)
    with stack.applied(tiny_lm):
        together = complete(tiny_lm, texts, new_tokens=6)
        assert together == [without_cache(tiny_lm, text, 6) for text in texts]
    assert together[2] == plain[2] and together[:2] != plain[:2]


def test_the_later_expert_of_a_prompt_answers_it(tiny_lm: LanguageModel) -> None:
    first, later = (expert(tiny_lm, TEXTS[0], seed) for seed in (1, 2))
    with later.applied(tiny_lm):
        wanted = says(tiny_lm, TEXTS)
    with Stack([first, later]).applied(tiny_lm):
        assert torch.equal(says(tiny_lm, TEXTS), wanted)


def test_what_does_not_fit_is_refused(tiny_gpt2: LanguageModel) -> None:
    edit = expert(tiny_gpt2, TEXTS[0], 0)
    narrow: Tensor = edit.tensors["left"][:, :5]
    with pytest.raises(WrongModelError, match=r"left are \(5, 2\), not \(32, 'any'\)"):
        MemoryEdit(
            edit.kind,
            edit.path,
            {**edit.tensors, "left": narrow},
            edit.base,
            edit.settings,
            edit.serves,
            edit.requests,
        ).apply_(tiny_gpt2)
