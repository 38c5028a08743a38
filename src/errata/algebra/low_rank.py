"""LowRank: a change to a weight as the product of two thin factors.

Notation: a change D (d_out, d_in) = left (d_out, n) @ right (n, d_in), one column of `left` and
one row of `right` per fact. Norms and inner products go through n x n Gram matrices:
`<A, B> = tr(A^T B) = sum((A_left^T B_left) * (A_right B_right^T))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from errata.algebra.precision import is_finite, wide


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change `left @ right` to a weight of shape (d_out, d_in).

    Never materialised unless `dense()` is called: n facts in one layer cost n * (d_out + d_in)
    numbers instead of d_out * d_in.

    Raises:
        ValueError: the factors do not fit together.
    """

    left: Tensor
    """(d_out, n) what to write: one residual per fact."""

    right: Tensor
    """(n, d_in) when to write it: one detector per fact."""

    def __post_init__(self) -> None:
        """Refuse factors that do not fit together."""
        left, right = self.left, self.right
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(
                "left (d_out, n) and right (n, d_in) must share n, got "
                f"{tuple(left.shape)} and {tuple(right.shape)}."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """What the change adds to the layer's output; (..., d_in) -> (..., d_out)."""
        return (x @ self.right.mT) @ self.left.mT  # the thin product first

    def __add__(self, other: LowRank) -> LowRank:
        """Both changes at once; the ranks add up."""
        if self.shape != other.shape:
            raise ValueError(f"cannot add changes of shapes {self.shape} and {other.shape}.")
        other = other.to(device=self.left.device)
        left, right = (self.left, other.left), (self.right, other.right)
        return LowRank(_joined(left, dim=1), _joined(right, dim=0))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight that is changed."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """How many columns `left` has: an upper bound of the matrix's rank."""
        return self.left.shape[1]

    @property
    def nbytes(self) -> int:
        """What the factors take."""
        return self.left.nbytes + self.right.nbytes

    def dense(self) -> Tensor:
        """The change as one (d_out, d_in) matrix."""
        return self.left @ self.right

    def inner(self, other: LowRank) -> float:
        """The trace inner product tr(D^T other), never dense."""
        lefts = wide(self.left).mT @ wide(other.left.to(self.left.device))
        rights = wide(self.right) @ wide(other.right.to(self.right.device)).mT
        return float((lefts * rights).sum())

    def norm(self) -> float:
        """The Frobenius norm, never dense."""
        return math.sqrt(max(self.inner(self), 0.0))

    def scaled(self, factor: float) -> LowRank:
        """`factor` times the change."""
        return LowRank(self.left * factor, self.right)

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRank:
        """The change in another dtype or on another device."""
        return LowRank(
            self.left.to(device=device, dtype=dtype), self.right.to(device=device, dtype=dtype)
        )

    def is_finite(self) -> bool:
        """Whether both factors are free of NaN and infinity."""
        return is_finite(self.left) and is_finite(self.right)

    @classmethod
    def exact(cls, change: Tensor) -> Self:
        """A whole matrix (d_out, d_in): itself beside the smaller identity, without any error."""
        d_out, d_in = change.shape
        identity = torch.eye(min(d_out, d_in), dtype=change.dtype, device=change.device)
        change = change.contiguous()
        return cls(change, identity) if d_in <= d_out else cls(identity, change)

    @classmethod
    def zero(cls, d_out: int, d_in: int) -> Self:
        """The change that changes nothing; its rank is 0."""
        return cls(torch.zeros(d_out, 0), torch.zeros(0, d_in))


def _joined(factors: tuple[Tensor, Tensor], *, dim: int) -> Tensor:
    dtype = torch.promote_types(factors[0].dtype, factors[1].dtype)
    return torch.cat([factor.to(dtype) for factor in factors], dim=dim)
