"""How exactly to compute: solves and sums in float64, float32 on devices without it."""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = {"mps"}


def widest(device: torch.device) -> torch.dtype:
    """The dtype of solves and sums on `device`."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def wide(x: Tensor) -> Tensor:
    """`x` in the widest dtype of its device."""
    return x.to(widest(x.device))


def is_finite(x: Tensor) -> bool:
    """Whether `x` holds neither NaN nor infinity."""
    return bool(torch.isfinite(x).all())
