"""LowRank's operations against the same on dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from errata.algebra.low_rank import LowRank

ranks = given(n=st.integers(0, 9), m=st.integers(0, 9), seed=st.integers(0, 10_000))


def low_rank(n: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(4, n, generator=generator, dtype=dtype)
    return LowRank(left, torch.randn(n, 6, generator=generator, dtype=dtype))


@settings(max_examples=25, deadline=None)
@ranks
def test_operations_equal_the_dense_ones(n: int, m: int, seed: int) -> None:
    a, b = low_rank(n, seed), low_rank(m, seed + 1)
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_close(a(x), x @ a.dense().mT)
    assert_close((a + b).dense(), a.dense() + b.dense())
    assert_close(a.scaled(-2.5).dense(), -2.5 * a.dense())
    assert math.isclose(a.norm(), float(a.dense().norm()), rel_tol=1e-10, abs_tol=1e-12)
    assert math.isclose(a.inner(b), float((a.dense() * b.dense()).sum()), abs_tol=1e-10)
    assert (a.shape, a.rank, (a + b).rank) == ((4, 6), n, n + m)
    assert a.nbytes == 8 * n * (4 + 6)


def test_a_difference_of_equals_is_small() -> None:
    a = low_rank(3, 0)
    assert (a + a.scaled(-1)).norm() < 1e-6 * a.norm()


def test_sums_keep_the_wider_dtype() -> None:
    assert (low_rank(2, 0, torch.float32) + low_rank(2, 1)).left.dtype == torch.float64


def test_zero_changes_nothing() -> None:
    zero = LowRank.zero(4, 6)
    assert_close(zero.dense(), torch.zeros(4, 6))
    assert zero.norm() == 0 and zero.nbytes == 0 and zero.is_finite()


def test_to_moves_both_factors() -> None:
    half = low_rank(2, 0).to(dtype=torch.bfloat16)
    assert half.left.dtype == half.right.dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_is_finite_looks_at_both_factors(bad: float) -> None:
    a = low_rank(2, 0)
    assert a.is_finite()
    assert not LowRank(a.left, a.right * bad).is_finite()
    assert not LowRank(a.left * bad, a.right).is_finite()


def test_factors_must_fit() -> None:
    with pytest.raises(ValueError, match="must share n"):
        LowRank(torch.ones(4, 2), torch.ones(3, 6))
    with pytest.raises(ValueError, match="cannot add"):
        low_rank(2, 0) + LowRank(torch.ones(5, 1), torch.ones(1, 6))
