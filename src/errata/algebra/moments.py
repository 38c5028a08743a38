"""Streaming second moments of keys: C = E[k k^T], one look at each token.

Rows are gathered in a buffer of `ROWS`, then folded into the sum. Only the lower triangle is
computed, in panels of `PANEL` rows: panel p adds X_p^T X_[0..p], so that d / PANEL matrix
products do little more than half of the full product's work. Each fold multiplies in float32
(float64 where the rows are) over at most `ROWS` rows and is then added to a float64 sum, so the
rounding does not grow with the length of the text.

Measured on one CPU thread at d = 3072: 1.85 times as fast as the full product, buffer and checks
included (the products alone 1.96 with panels of 256, 1.5 with 1024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from errata.algebra.precision import is_finite, widest
from errata.errors import MomentError, NotFiniteError

ROWS = 2048
"""Rows that are multiplied at once; the buffer takes ROWS * d numbers."""

PANEL = 256
"""Height of a panel of the triangle: within a tenth of the fastest of 128 to 1536 at d = 3072."""


class SecondMoment:
    """A running E[k k^T] over all rows seen.

    Args:
        dim: d, the length of a key.
        device: where the sum lives: d^2 numbers of 8 bytes.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._sum = torch.zeros(dim, dim, dtype=widest(device), device=device)  # lower triangle
        self._count = 0
        self._buffer = torch.empty(0, dim, device=device)
        self._waiting = 0

    @property
    def dim(self) -> int:
        """The length of a key."""
        return self._sum.shape[0]

    @property
    def count(self) -> int:
        """How many keys were seen."""
        return self._count + self._waiting

    def update(self, x: Tensor) -> None:
        """Add keys; (..., d), every leading index is one key.

        Raises:
            MomentError: the keys have another length.
            NotFiniteError: the keys hold NaN or infinity (told when the buffer is folded).
        """
        if x.shape[-1] != self.dim:
            raise MomentError(f"keys of {x.shape[-1]} numbers for a moment of {self.dim}.")
        rows = x.detach().reshape(-1, self.dim)
        self._make_room(rows.dtype)
        while len(rows):
            taken = rows[: ROWS - self._waiting]
            self._buffer[self._waiting : self._waiting + len(taken)] = taken.to(self._buffer)
            self._waiting += len(taken)
            rows = rows[len(taken) :]
            if self._waiting == ROWS:
                self._fold()

    def merge(self, other: SecondMoment) -> None:
        """Add all that `other` saw, as if it had been seen here; `other` stays as it is.

        Raises:
            MomentError: the other moment is of keys of another length.
        """
        if other.dim != self.dim:
            raise MomentError(f"cannot merge moments of {other.dim} and {self.dim} numbers.")
        other._fold()
        self._sum += other._sum.to(self._sum)
        self._count += other._count

    def mean(self) -> Tensor:
        """C = X^T X / count, (d, d), symmetric to the bit, in the sum's dtype.

        Raises:
            MomentError: no key was seen.
            NotFiniteError: the keys seen last hold NaN or infinity.
        """
        self._fold()
        if not self._count:
            raise MomentError("no key was seen: the text for the second moment is empty.")
        mean = self._sum / self._count
        for start in range(0, self.dim, PANEL):
            stop = start + PANEL
            mean[:start, start:stop] = mean[start:stop, :start].mT
            mean[start:stop, start:stop] = _symmetric(mean[start:stop, start:stop])
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """All there is to resume from, as tensors; copies, so that updates may go on."""
        self._fold()
        return {"sum": self._sum.clone(), "count": torch.tensor(self._count)}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], device: torch.device | str | None = None
    ) -> Self:
        """Go on from a `state_dict()`, on the sum's device or another one.

        Raises:
            MomentError: the state is not one of a second moment.
        """
        total, count = state.get("sum"), state.get("count")
        if total is None or count is None or total.ndim != 2 or total.shape[0] != total.shape[1]:
            raise MomentError("this is not the state of a second moment ('sum' (d, d), 'count').")
        moment = cls(len(total), total.device if device is None else device)
        moment._sum.copy_(total)
        moment._count = int(count)
        return moment

    def _make_room(self, dtype: torch.dtype) -> None:
        """Have a buffer that holds rows of `dtype` without loss, float32 at least."""
        wanted = self._sum.dtype if dtype == torch.float64 else torch.float32
        if wanted != self._buffer.dtype or not len(self._buffer):
            self._fold()
            self._buffer = self._sum.new_empty(ROWS, self.dim, dtype=wanted)

    def _fold(self) -> None:
        """Multiply the rows that wait and add them to the sum."""
        rows = self._buffer[: self._waiting]
        self._waiting = 0
        if not is_finite(rows):
            raise NotFiniteError(
                "keys hold NaN or infinity: the model's weights are damaged, or it overflows in "
                "its dtype (run it in float32 or bfloat16)."
            )
        for start in range(0, self.dim if len(rows) else 0, PANEL):
            stop = start + PANEL
            self._sum[start:stop, :stop] += rows[:, start:stop].mT @ rows[:, :stop]
        self._count += len(rows)


def _symmetric(block: Tensor) -> Tensor:
    return block.tril() + block.tril(-1).mT
