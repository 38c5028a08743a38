"""Estimates as text."""

from __future__ import annotations

import math

from errata.measure.metrics import Estimate


def estimate(value: Estimate, places: int = 2) -> str:
    """`0.31 [0.22, 0.41]`; what is not known is a dash."""
    if math.isnan(value.mean) or math.isnan(value.low):
        return number(value.mean)
    return f"{value.mean:.{places}f} [{value.low:.{places}f}, {value.high:.{places}f}]"


def number(value: float) -> str:
    """Three decimals; what is not known is a dash."""
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.3f}"
