"""Rows of gradients against autograd's own gradients of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from errata.editors.hypernet.gradients import Decomposed, decompose
from errata.errors import NotFiniteError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.lm.weights import weight_out_in
from tests.editors.hypernet.models import KINDS, mlps, some
from tests.lm.families import tiny_lm


def plain(lm: LanguageModel, example: Example, path: str) -> Tensor:
    """(d_out, d_in) autograd's gradient of one example's loss."""
    module = lm.module(path)
    assert isinstance(module.weight, Tensor)
    (gradient,) = torch.autograd.grad(losses(lm, [example]).sum(), [module.weight])
    return gradient.T if isinstance(module, Conv1D) else gradient


@pytest.mark.parametrize("batch_tokens", [4096, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_over_tokens_is_the_gradient_of_each_example(kind: str, batch_tokens: int) -> None:
    lm = tiny_lm(kind, dtype=torch.float64)
    examples, paths = some(lm), mlps(lm, 0, lm.layers - 1)
    found = decompose(lm, examples, paths, batch_tokens=batch_tokens)
    for path in paths:
        for number, example in enumerate(examples):
            mine = found[path].of(number)
            wanted = plain(lm, example, path)
            assert wanted.norm() > 0
            assert_close(mine.deltas.T @ mine.inputs, wanted, rtol=1e-6, atol=1e-9)
            assert_close(mine.low_rank().dense(), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "bert-labels", "t5"])
def test_it_holds_in_single_precision(kind: str) -> None:
    lm = tiny_lm(kind)
    examples, paths = some(lm), mlps(lm, 1)
    for path, rows in decompose(lm, examples, paths).items():
        wanted = torch.stack([plain(lm, example, path) for example in examples]).sum(0)
        assert float((rows.deltas.T @ rows.inputs - wanted).norm() / wanted.norm()) < 1e-5


def test_rows_of_zeros_are_dropped() -> None:
    """Padding has no gradient; in the last block, nor has what stands before the answer."""
    lm = tiny_lm("gpt2")
    examples = some(lm)
    first, last = mlps(lm, 0)[0], mlps(lm, lm.layers - 1)[0]
    found = decompose(lm, examples, [first, last])
    answers = [len(lm.tokenizer(" " + e.answer)["input_ids"]) for e in examples]
    prompts = [len(lm.tokenizer(e.prompt)["input_ids"]) for e in examples]
    assert torch.bincount(found[last].owner).tolist() == answers
    whole = [a + p - 1 for a, p in zip(answers, prompts, strict=True)]
    assert torch.bincount(found[first].owner).tolist() == whole
    for rows in found.values():
        assert (rows.deltas != 0).any(1).all() and (rows.inputs != 0).any(1).all()


def test_nothing_is_left_behind() -> None:
    lm = tiny_lm("gpt2")
    before = {name: weight.clone() for name, weight in lm.network.named_parameters()}
    with torch.no_grad():  # it asks for the gradients that it needs itself
        found = decompose(lm, some(lm), mlps(lm, 1))
    for name, weight in lm.network.named_parameters():
        assert weight.grad is None and weight.requires_grad
        assert torch.equal(weight, before[name])
    assert not any(
        rows.deltas.requires_grad or rows.inputs.requires_grad for rows in found.values()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.network.modules())


def test_a_loss_that_is_not_finite_is_refused() -> None:
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        weight_out_in(lm.mlp_in(0))[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        decompose(lm, some(lm), mlps(lm, 1))


def test_many_rows_are_no_larger_than_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for d_out, d_in in ((4, 6), (6, 4)):
        inputs = torch.randn(9, d_in, generator=generator)
        deltas = torch.randn(9, d_out, generator=generator)
        change = Decomposed(inputs, deltas, torch.zeros(9, dtype=torch.long)).low_rank()
        assert change.rank == 4 and change.shape == (d_out, d_in)
        assert_close(change.dense(), deltas.T @ inputs)


def test_stacking_keeps_each_owner_to_itself() -> None:
    owner = torch.tensor([0, 0, 2, 2, 2])
    rows = Decomposed(torch.randn(5, 3), torch.randn(5, 2, requires_grad=True), owner)
    left, right = rows.stacked(4)
    assert left.shape == (4, 2, 3) and right.shape == (4, 3, 3)
    for number in range(4):
        mine = rows.of(number)
        assert_close(left[number] @ right[number], mine.deltas.T @ mine.inputs)
    left.sum().backward()  # type: ignore[no-untyped-call]
    assert rows.deltas.grad is not None and (rows.deltas.grad == 1).all()
