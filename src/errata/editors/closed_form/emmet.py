"""EMMET: many facts at once under the equality constraint (A Unified Framework for Model Editing).

With keys K, residuals R and second moment C of old keys,

    D = R^T (K C^-1 K^T)^-1 K C^-1   (the paper's equation 14),

so that (W + D) K^T holds every wanted value exactly; with one fact it is ROME. A small ridge on
the n x n system, `relaxation`, steadies large batches: it is then MEMIT with that lambda.
"""

from __future__ import annotations

from dataclasses import dataclass

from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.keys import Averaging


@dataclass(frozen=True)
class EmmetConfig(ClosedFormConfig):
    """EMMET: equality constraint, target at the block's output, one layer, one batch."""

    averaging: Averaging = "half-bare"


class Emmet(ClosedForm):
    """Equality-constrained mass model editing in a transformer."""

    name = "emmet"
    depth = (5 / 28, 5 / 28)  # single layer: the paper's GPT-J and Llama choice
