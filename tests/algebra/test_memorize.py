"""The theorems of the preservation-memorization solve, in float64 on small random problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.testing import assert_close

from errata.algebra.memorize import Factor, factor, memorize
from errata.errors import NotFiniteError, SolveError

D_IN, D_OUT = 8, 5
problems = given(n=st.integers(1, 6), seed=st.integers(0, 10_000))
few = settings(max_examples=25, deadline=None)


@dataclass
class Problem:
    keys: Tensor
    residuals: Tensor
    moment: Tensor

    @property
    def factor(self) -> Factor:
        return factor(self.moment)

    def solve(self, relaxation: float) -> Tensor:
        return memorize(self.keys, self.residuals, self.factor, relaxation=relaxation).dense()


def problem(n: int, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old = normal(5 * D_IN, D_IN) * torch.linspace(0.3, 3, D_IN, dtype=torch.float64)
    return Problem(normal(n, D_IN), normal(n, D_OUT), old.mT @ old / len(old))


@few
@problems
def test_without_relaxation_every_fact_holds_exactly(n: int, seed: int) -> None:
    p = problem(n, seed)
    change = memorize(p.keys, p.residuals, p.factor, relaxation=0)
    assert_close(change(p.keys), p.residuals, rtol=0, atol=1e-8)
    assert change.rank == n and change.left.dtype == torch.float64


@few
@problems
def test_no_feasible_change_disturbs_old_keys_less(n: int, seed: int) -> None:
    """Stationarity: D C vanishes on the null space of K."""
    p = problem(n, seed)
    null = torch.linalg.svd(p.keys).Vh[n:].mT
    assert_close(
        p.solve(0) @ p.moment @ null, torch.zeros(D_OUT, D_IN - n).double(), rtol=0, atol=1e-8
    )


@few
@problems
def test_equality_agrees_with_the_kkt_system(n: int, seed: int) -> None:
    """min tr(D C D^T) s.t. D K^T = R^T: [C K^T; K 0] [D^T; mu] = [0; R], by a general solver."""
    p = problem(n, seed)
    keys, moment = p.keys.numpy(), p.moment.numpy()
    kkt = np.block([[moment, keys.T], [keys, np.zeros((n, n))]])
    wanted = np.linalg.solve(kkt, np.vstack([np.zeros((D_IN, D_OUT)), p.residuals.numpy()]))
    assert_close(p.solve(0), torch.from_numpy(wanted[:D_IN].T), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("relaxation", [0.0, 0.7])
def test_agrees_with_a_general_optimiser(relaxation: float) -> None:
    p = problem(3, seed=4)
    keys, residuals, moment = p.keys.numpy(), p.residuals.numpy(), p.moment.numpy()

    def errors(flat: np.ndarray) -> np.ndarray:
        return np.asarray(keys @ flat.reshape(D_OUT, D_IN).T - residuals)

    def disturbance(flat: np.ndarray) -> float:
        d = flat.reshape(D_OUT, D_IN)
        return float(np.trace(d @ moment @ d.T))

    def objective(flat: np.ndarray) -> float:
        if not relaxation:
            return disturbance(flat)
        return float((errors(flat) ** 2).sum()) + relaxation * disturbance(flat)

    held = [] if relaxation else [{"type": "eq", "fun": lambda flat: errors(flat).ravel()}]
    found = minimize(
        objective,
        np.zeros(D_OUT * D_IN),
        method="SLSQP",
        constraints=held,
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    wanted = torch.from_numpy(found.x.reshape(D_OUT, D_IN))
    assert_close(p.solve(relaxation), wanted, rtol=0, atol=1e-4)
    assert objective(p.solve(relaxation).numpy().ravel()) <= objective(found.x) + 1e-7


@few
@given(seed=st.integers(0, 10_000))
def test_one_fact_is_romes_formula(seed: int) -> None:
    """(v - W k) (C^-1 k)^T / (k^T C^-1 k)."""
    p = problem(1, seed)
    key, residual = p.keys[0], p.residuals[0]
    u = torch.linalg.solve(p.moment, key)
    assert_close(p.solve(0), torch.outer(residual, u) / (key @ u), rtol=1e-8, atol=1e-9)


@few
@given(n=st.integers(1, 20), seed=st.integers(0, 10_000), relaxation=st.floats(0.01, 100))
def test_relaxed_is_memits_formula(n: int, seed: int, relaxation: float) -> None:
    """Woodbury; holds with more facts than dimensions, too."""
    p = problem(n, seed)
    system = relaxation * p.moment + p.keys.mT @ p.keys
    memit = torch.linalg.solve(system, p.keys.mT @ p.residuals).mT
    assert_close(p.solve(relaxation), memit, rtol=1e-7, atol=1e-9)


@few
@problems
def test_tends_to_equality_as_the_relaxation_vanishes(n: int, seed: int) -> None:
    p = problem(n, seed)
    exact = p.solve(0)
    gaps = [float((p.solve(lam) - exact).norm()) for lam in (1e-2, 1e-5, 1e-8)]
    assert gaps[0] >= gaps[1] >= gaps[2]
    assert gaps[2] <= 1e-3 * (1 + float(exact.norm()))


@few
@problems
def test_tends_to_nothing_as_the_relaxation_grows(n: int, seed: int) -> None:
    assert float(problem(n, seed).solve(1e9).norm()) < 1e-5


@few
@given(n=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_more_relaxation_disturbs_old_keys_less(n: int, seed: int) -> None:
    """The disturbance tr(D C D^T), the norm that the objective counts, falls with lam."""
    p = problem(n, seed)
    changes = [p.solve(lam) for lam in (0.1, 1, 10, 100)]
    disturbances = [float((d @ p.moment @ d.mT).trace()) for d in changes]
    assert disturbances == sorted(disturbances, reverse=True)
    misses = [float((p.keys @ d.mT - p.residuals).norm()) for d in changes]
    assert misses == sorted(misses)


def test_a_reused_factor_is_a_fresh_one() -> None:
    reused = problem(3, seed=0).factor
    for seed in range(3):  # same moment would be seed 0's; only keys and residuals change
        p = problem(3, seed)
        again = memorize(p.keys, p.residuals, reused, relaxation=1.0)
        fresh = memorize(p.keys, p.residuals, factor(problem(3, 0).moment), relaxation=1.0)
        assert torch.equal(again.dense(), fresh.dense())


def test_whiten_is_k_times_c_inverse() -> None:
    p = problem(4)
    assert_close(p.factor.whiten(p.keys) @ p.moment, p.keys)


def test_half_precision_keys_are_solved_in_float64() -> None:
    p = problem(3)
    change = memorize(p.keys.bfloat16(), p.residuals.float(), p.factor, relaxation=0)
    assert change.right.dtype == torch.float64
    assert_close(change(p.keys.bfloat16().double()), p.residuals.float().double())


def test_two_facts_with_one_key_are_named() -> None:
    p = problem(5)
    p.keys[3] = 2 * p.keys[1]
    with pytest.raises(SolveError, match=r"facts 1 and 3 have the same key[\s\S]*relaxation > 0"):
        p.solve(0)
    assert torch.isfinite(p.solve(0.5)).all()


def test_float32_noise_does_not_hide_a_shared_key() -> None:
    p = problem(4)
    p.keys[2] = p.keys[0]
    p.keys = p.keys.float()
    p.keys[2, 0] = torch.nextafter(p.keys[2, 0], torch.tensor(9.0))
    with pytest.raises(SolveError, match="facts 0 and 2"):
        p.solve(0)


def test_a_key_made_of_others_is_named() -> None:
    p = problem(4)
    p.keys[3] = p.keys[0] + p.keys[2]
    with pytest.raises(SolveError, match="fact 3 is a combination"):
        p.solve(0)


def test_a_zero_key_is_named() -> None:
    p = problem(3)
    p.keys[1] = 0
    with pytest.raises(SolveError, match="fact 1 is zero"):
        p.solve(0)


def test_a_relaxation_lost_in_rounding_is_refused() -> None:
    p = problem(2)
    p.keys[1] = p.keys[0]
    with pytest.raises(SolveError, match=r"relaxation of 1e-200"):
        p.solve(1e-200)


def test_more_facts_than_dimensions_need_a_relaxation() -> None:
    with pytest.raises(SolveError, match="at most 8 facts"):
        problem(9).solve(0)


@pytest.mark.parametrize("relaxation", [-1.0, float("nan"), float("inf")])
def test_a_relaxation_must_be_a_number_from_zero(relaxation: float) -> None:
    with pytest.raises(SolveError, match="relaxation must be"):
        problem(2).solve(relaxation)


@pytest.mark.parametrize("what", ["key", "residual"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_fact(what: str, bad: float) -> None:
    p = problem(4)
    (p.keys if what == "key" else p.residuals)[2, 1] = bad
    with pytest.raises(NotFiniteError, match=f"the {what} of fact 2 "):
        p.solve(0)


def test_shapes_must_fit() -> None:
    p = problem(3)
    with pytest.raises(SolveError, match="one row per fact"):
        memorize(p.keys, p.residuals[:2], p.factor, relaxation=0)
    with pytest.raises(SolveError, match="one row per fact"):
        memorize(p.keys[:0], p.residuals[:0], p.factor, relaxation=0)
    with pytest.raises(SolveError, match="another layer or model"):
        memorize(p.keys[:, :4], p.residuals, p.factor, relaxation=0)


def test_a_moment_from_too_few_tokens_is_refused() -> None:
    rows = torch.randn(5, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SolveError, match=r"singular: unit 5 [\s\S]*too few tokens[\s\S]*more text"):
        factor(rows.mT @ rows / 5)


def test_a_unit_that_never_fires_is_named() -> None:
    moment = problem(1).moment
    moment[3], moment[:, 3] = 0, 0
    with pytest.raises(SolveError, match="unit 3 "):
        factor(moment)


def test_a_moment_must_be_square_and_finite() -> None:
    with pytest.raises(SolveError, match="square"):
        factor(torch.ones(3, 4))
    with pytest.raises(NotFiniteError):
        factor(torch.full((3, 3), float("nan")))
