"""Neurons that stand beside an MLP: one more key, bias and value each.

For what goes into the MLP, x (d_in), n neurons add

    sum_i  act(k_i . x + b_i) v_i

to what comes out of it (d_out), with the MLP's own function act. In a gated MLP, a neuron's gate is
its key and its other branch the constant 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Neurons:
    """n neurons; as many numbers as n more columns of one matrix and n more rows of another."""

    keys: Tensor
    """(n, d_in) when each fires."""
    biases: Tensor
    """(n,)."""
    values: Tensor
    """(n, d_out) what each adds to the MLP's output."""

    @classmethod
    def joined(cls, some: Sequence[Neurons]) -> Neurons:
        """Several together, in order."""
        return cls(
            torch.cat([one.keys for one in some]),
            torch.cat([one.biases for one in some]),
            torch.cat([one.values for one in some]),
        )

    def drives(self, x: Tensor) -> Tensor:
        """(..., n) how strongly x (..., d_in) drives each neuron, before its function."""
        return x.to(self.keys) @ self.keys.mT + self.biases

    def __call__(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """(..., d_out) what the neurons add to the output of an MLP that sees x (..., d_in)."""
        return act(self.drives(x)) @ self.values

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype) -> Neurons:
        """The same elsewhere, or in another dtype."""
        return Neurons(
            self.keys.to(device=device, dtype=dtype),
            self.biases.to(device=device, dtype=dtype),
            self.values.to(device=device, dtype=dtype),
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """What the tensors take in memory."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.biases, self.values))
