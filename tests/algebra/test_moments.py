"""The streaming second moment: exact, mergeable in any order, resumable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from errata.algebra import moments
from errata.algebra.moments import PANEL, SecondMoment
from errata.errors import MomentError, NotFiniteError


def rows(count: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64).to(dtype)


def moment_of(*chunks: Tensor) -> SecondMoment:
    moment = SecondMoment(chunks[0].shape[-1])
    for chunk in chunks:
        moment.update(chunk)
    return moment


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 12), count=st.integers(1, 40), cut=st.integers(0, 40))
def test_is_the_mean_of_outer_products(dim: int, count: int, cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "ROWS", 7)  # several folds and several panels in small problems
        patch.setattr(moments, "PANEL", 4)
        x = rows(count, dim)
        moment = moment_of(x[:cut], x[cut:])
        assert moment.count == count
        assert_close(moment.mean(), x.mT @ x / count, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dim", [PANEL - 1, PANEL, 2 * PANEL + 3])
def test_panels_cover_the_triangle(dim: int) -> None:
    x = rows(3000, dim)
    mean = moment_of(x).mean()
    assert torch.equal(mean, mean.mT)
    assert_close(mean, x.mT @ x / len(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_keys_are_summed_in_float32_or_better(dtype: torch.dtype) -> None:
    x = rows(5000, 16, dtype=dtype)
    exact = x.double().mT @ x.double() / len(x)
    assert_close(moment_of(x).mean(), exact, rtol=1e-5, atol=1e-6)


def test_every_leading_index_is_a_key() -> None:
    x = rows(12, 5)
    assert torch.equal(moment_of(x.reshape(3, 4, 5)).mean(), moment_of(x).mean())


def test_the_order_of_merging_does_not_matter() -> None:
    chunks = [rows(count, 6, seed) for seed, count in enumerate((3, 1, 8))]
    whole = torch.cat(chunks)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = SecondMoment(6)
        for index in order:
            merged.merge(moment_of(chunks[index]))
        assert merged.count == 12
        assert_close(merged.mean(), whole.mT @ whole / 12, rtol=1e-13, atol=1e-14)


def test_merging_leaves_the_other_as_it_is() -> None:
    a, b = moment_of(rows(4, 3)), moment_of(rows(5, 3, seed=1))
    before = b.mean()
    a.merge(b)
    assert torch.equal(b.mean(), before) and b.count == 5


def test_a_resumed_moment_is_the_uninterrupted_one() -> None:
    x = rows(30, 4)
    first = moment_of(x[:11])
    state = first.state_dict()
    first.update(rows(5, 4, seed=9))  # the state is a copy
    resumed = SecondMoment.from_state(state)
    resumed.update(x[11:])
    assert resumed.count == 30
    assert_close(resumed.mean(), moment_of(x).mean(), rtol=1e-13, atol=1e-14)


def test_later_changes_of_the_keys_do_not_matter() -> None:
    x = rows(3, 4)
    moment = moment_of(x)
    wanted = x.mT @ x / 3
    x.zero_()
    assert_close(moment.mean(), wanted)


def test_float32_then_float64_keys() -> None:
    x = rows(6, 3)
    assert_close(moment_of(x[:3].float(), x[3:]).mean(), x.mT @ x / 6, rtol=1e-5, atol=1e-6)


def test_needs_keys() -> None:
    with pytest.raises(MomentError, match="no key was seen"):
        SecondMoment(3).mean()


def test_dimensions_must_fit() -> None:
    with pytest.raises(MomentError, match="4 numbers for a moment of 3"):
        SecondMoment(3).update(rows(2, 4))
    with pytest.raises(MomentError, match="cannot merge"):
        SecondMoment(3).merge(SecondMoment(4))
    with pytest.raises(MomentError, match="not the state"):
        SecondMoment.from_state({"sum": torch.ones(2, 3), "count": torch.tensor(1)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    x = rows(4, 3)
    x[2, 1] = bad
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        moment_of(x).mean()
