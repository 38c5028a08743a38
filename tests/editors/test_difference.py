"""Weights on loan, and what became of them as factors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from errata.algebra.low_rank import LowRank
from errata.editors.difference import borrowed, factors
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode, pad
from errata.lm.weights import weight_out_in
from tests.lm.families import tiny_lm

PROMPT = "The capital of France is"


def said(lm: LanguageModel) -> torch.Tensor:
    batch = pad(lm, encode(lm, [PROMPT]))
    logits = lm.network(batch.ids).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_without_a_rank_factors_are_the_change_bit_for_bit(shape: tuple[int, int]) -> None:
    change = torch.randn(shape)
    found, missed = factors(change, None)
    assert torch.equal(found.dense(), change) and missed == 0.0
    assert found.rank == min(shape)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_with_a_rank_they_are_the_nearest_matrix_of_that_rank(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, dtype=torch.float64)
    found, missed = factors(change, 2)
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    assert found.rank == 2
    assert_close(found.dense(), u[:, :2] @ torch.diag(s[:2]) @ v[:2])
    assert missed == pytest.approx(float(s[2:].norm() / s.norm()))


def test_a_change_of_that_rank_is_kept_and_none_stays_none() -> None:
    thin = LowRank(torch.randn(7, 2), torch.randn(2, 4)).dense()
    found, missed = factors(thin, 2)
    assert_close(found.dense(), thin)
    assert missed < 1e-6
    nothing, missed = factors(torch.zeros(7, 4), 2)
    assert not nothing.dense().any() and missed == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2-square", "llama"])
def test_the_model_runs_on_the_copies_and_gets_its_own_weights_back(
    family: str, dtype: torch.dtype
) -> None:
    lm = tiny_lm(family, dtype=dtype)
    path = lm.mlp_out_path(1)
    weight = lm.mlp_out(1).weight
    assert isinstance(weight, torch.nn.Parameter)
    place, before = weight.data_ptr(), weight_out_in(lm.mlp_out(1)).clone()
    start = said(lm)
    lm.mlp_in(0).weight.requires_grad_(False)
    asked = [p.requires_grad for p in lm.network.parameters()]
    with borrowed(lm, [path]) as loan:
        assert [p for p in lm.network.parameters() if p.requires_grad] == [weight]
        assert torch.equal(said(lm), start)
        assert loan.copies[0].dtype == torch.promote_types(dtype, torch.float32)
        loan.copies[0].mul_(1.5)
        loan.show_()
        moved = said(lm)
        assert not torch.equal(moved, start)
        with loan.as_before():
            assert torch.equal(said(lm), start)
        assert torch.equal(said(lm), moved)
        change = loan.moved()[path]
    assert_close(change, (before.to(change) * 0.5), rtol=1e-2, atol=1e-6)
    assert weight.data_ptr() == place and torch.equal(weight_out_in(lm.mlp_out(1)), before)
    assert [p.requires_grad for p in lm.network.parameters()] == asked
    with torch.no_grad():  # the change is that of the (d_out, d_in) view, also in square matrices
        weight_out_in(lm.mlp_out(1)).copy_(before + change.to(dtype))
    assert_close(said(lm), moved, rtol=1e-2, atol=1e-2)


def test_an_error_inside_changes_nothing() -> None:
    lm = tiny_lm("gpt2")
    before = weight_out_in(lm.mlp_out(2)).clone()
    with pytest.raises(KeyboardInterrupt), borrowed(lm, [lm.mlp_out_path(2)]) as loan:
        loan.copies[0].zero_()
        loan.show_()
        raise KeyboardInterrupt
    assert torch.equal(weight_out_in(lm.mlp_out(2)), before)
    assert all(p.requires_grad for p in lm.network.parameters())
