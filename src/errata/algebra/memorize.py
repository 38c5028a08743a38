"""The one solve under ROME, MEMIT and EMMET: write new keys, preserve what old keys say.

Notation (rows are facts): K keys (n, d_in), R residuals (n, d_out) = wanted minus current output,
C = E[k k^T] (d_in, d_in) the second moment of old keys, `lam` the relaxation.

    D = R^T (K C^-1 K^T + lam I)^-1 K C^-1

- lam = 0 minimises tr(D C D^T) subject to D k_i = r_i: EMMET, and ROME where n = 1;
- lam > 0 minimises sum_i |D k_i - r_i|^2 + lam tr(D C D^T): MEMIT, since by Woodbury
  D = R^T K (lam C + K^T K)^-1.

C's Cholesky factor is computed once per layer, d_in^3 / 3; a batch then costs d_in^2 n + n^3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.algebra.precision import is_finite, wide
from errata.errors import NotFiniteError, SolveError


@dataclass(frozen=True, eq=False)
class Factor:
    """The Cholesky factor of a second moment, C = lower @ lower^T; reused by every batch."""

    lower: Tensor
    """(d_in, d_in), float64; float32 on devices without it."""

    @property
    def dim(self) -> int:
        """d_in, the length of a key."""
        return self.lower.shape[0]

    def whiten(self, keys: Tensor) -> Tensor:
        """K C^-1; (n, d_in) -> (n, d_in)."""
        return torch.cholesky_solve(keys.to(self.lower).mT, self.lower).mT


def factor(moment: Tensor) -> Factor:
    """Factor a second moment, or refuse it.

    Args:
        moment: (d_in, d_in), E[k k^T] over ordinary text; symmetric, positive definite. Only its
            lower triangle is read.

    Raises:
        NotFiniteError: the moment holds NaN or infinity.
        SolveError: the moment is not a square matrix, or not positive definite.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise SolveError(f"a second moment is a square matrix, got shape {tuple(moment.shape)}.")
    if not is_finite(moment):
        raise NotFiniteError(
            "the second moment holds NaN or infinity: some activation overflowed. Collect it "
            "again with the model in float32 or bfloat16."
        )
    moment = wide(moment)
    lower, dependent = _cholesky(moment, tolerance=_eps(moment) ** 0.7)  # 1e-11 in float64
    if dependent is not None:
        raise SolveError(
            f"the second moment ({len(moment)} x {len(moment)}) is singular: unit {dependent} "
            "says nothing that the units before it do not.\n"
            f"  Causes: it was taken over too few tokens (it needs well over {len(moment)}, the "
            "key's length, and from varied text); or the unit never fires.\n"
            "  Remedies: collect it over more text, or add a small multiple of the identity."
        )
    return Factor(lower)


def memorize(keys: Tensor, residuals: Tensor, factor: Factor, *, relaxation: float) -> LowRank:
    """The least disturbing change that writes `residuals` at `keys`.

    Args:
        keys: (n, d_in), inputs of the layer, one row per fact.
        residuals: (n, d_out), wanted minus current output of the layer.
        factor: of the second moment of old keys, from `factor()`.
        relaxation: lam; 0 writes every fact exactly, more preserves more. It counts ordinary
            text in facts.

    Returns:
        The change, in the factor's dtype and on its device: `left` holds the residuals, `right`
        one detector per fact.

    Raises:
        NotFiniteError: keys, residuals or the result hold NaN or infinity.
        SolveError: shapes do not fit, the relaxation is no finite number from 0, or the facts
            cannot all be written exactly (two share a key, say) and the relaxation is 0.
    """
    _check(keys, residuals, factor, relaxation)
    whitened = factor.whiten(keys)  # K C^-1
    gram = whitened @ keys.to(whitened).mT  # K C^-1 K^T
    system = gram + relaxation * torch.eye(len(keys)).to(gram)
    tolerance = max(8 * len(keys) * _eps(gram), (4 * _eps(keys)) ** 2)
    lower, dependent = _cholesky(system, tolerance=tolerance)
    if dependent is not None:
        raise SolveError(_why_singular(gram, dependent, relaxation))
    change = LowRank(residuals.to(gram).mT, torch.cholesky_solve(whitened, lower))
    if not change.is_finite():
        raise NotFiniteError("the solve overflowed; keys and residuals are too far apart in size.")
    return change


def _check(keys: Tensor, residuals: Tensor, factor: Factor, relaxation: float) -> None:
    n, d_in = keys.shape if keys.ndim == 2 else (0, 0)
    if n == 0 or residuals.ndim != 2 or len(residuals) != n:
        raise SolveError(
            "keys (n, d_in) and residuals (n, d_out) need one row per fact, got "
            f"{tuple(keys.shape)} and {tuple(residuals.shape)}."
        )
    if d_in != factor.dim:
        raise SolveError(
            f"the keys have {d_in} numbers, the second moment is of keys of {factor.dim}: "
            "it belongs to another layer or model."
        )
    if not (math.isfinite(relaxation) and relaxation >= 0):
        raise SolveError(f"the relaxation must be a finite number from 0, got {relaxation}.")
    for name, rows in ("key", keys), ("residual", residuals):
        if not is_finite(rows):
            bad = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten().tolist()
            raise NotFiniteError(
                f"the {name} of fact {_listed(bad)} (counting from 0) holds NaN or infinity: the "
                "model overflows there, or its weights are damaged."
            )
    if relaxation == 0 and n > d_in:
        raise SolveError(
            f"{n} facts cannot all hold exactly: keys have {d_in} numbers, so at most {d_in} facts "
            "fit into one layer under the equality constraint. Write fewer at once, or relax it "
            "(relaxation > 0)."
        )


def _cholesky(matrix: Tensor, *, tolerance: float) -> tuple[Tensor, int | None]:
    """The Cholesky factor and the first row that depends on those before it, if any does.

    The squared pivot of row i over its diagonal entry is the part of row i that the rows before do
    not explain, whatever the rows' scales; at or under `tolerance` it is rounding.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    unexplained = lower.diagonal().square() / matrix.diagonal()
    dependent = ~(unexplained > tolerance)  # NaN counts as dependent
    if stopped := int(info):  # LAPACK's count from 1; later rows are not factored
        dependent[stopped - 1] = True
    first: list[int] = dependent.nonzero().flatten()[:1].tolist()
    return lower, first[0] if first else None


def _why_singular(gram: Tensor, fact: int, relaxation: float) -> str:
    """Which facts cannot be told apart, and what to do."""
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    cosines = (gram[fact] / (scale * scale[fact])).abs()
    if not gram[fact, fact] > 0:
        what = f"the key of fact {fact} is zero"
    elif fact and (best := cosines[:fact].max()) > 1 - 1e-4:
        twins = (cosines[:fact] >= best - 1e-6).nonzero().flatten().tolist()
        what = f"facts {_listed([*twins, fact])} have the same key up to scale"
    else:
        what = f"the key of fact {fact} is a combination of those of the facts before it"
    constraint = "with relaxation 0" if relaxation == 0 else f"with a relaxation of {relaxation:g}"
    return (
        f"the facts cannot all be written {constraint}: {what} (counting from 0).\n"
        "  Causes: one subject in the same words in several requests, or the same request twice.\n"
        "  Remedies: write these facts in separate batches, drop one of them, or allow a "
        "compromise (a larger relaxation > 0)."
    )


def _eps(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).eps)


def _listed(numbers: list[int], most: int = 8) -> str:
    shown = [str(number) for number in numbers[:most]]
    if len(numbers) > most:
        return ", ".join(shown) + f" and {len(numbers) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
