"""MEMIT: many facts at once, spread over several MLP matrices (Meng et al. 2023, arXiv:2210.07229).

With keys K, residuals R and second moment C of old keys, each layer's change is

    D = R^T K (lambda C + K^T K)^-1,

the least-squares relaxation of the equality constraint. R is what is still missing at the last
layer's output, divided by the number of layers that remain, measured anew at each layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.keys import Averaging


@dataclass(frozen=True)
class MemitConfig(ClosedFormConfig):
    """MEMIT: least squares, target at the block's output, several layers, one batch."""

    relaxation: float = 0.05
    averaging: Averaging = "half-bare"


class Memit(ClosedForm):
    """Mass-editing memory in a transformer."""

    name = "memit"
    depth = (3 / 28, 8 / 28)  # the paper's GPT-J layers
