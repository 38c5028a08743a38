"""ROME: one fact as a rank-one change of one MLP matrix (Meng et al. 2022, arXiv:2202.05262).

With key k, wanted value v* and second moment C of old keys, the change is

    D = (v* - W k) (C^-1 k)^T / (k^T C^-1 k),

the least disturbance of old keys under the constraint (W + D) k = v*. The same averaged key k
stands in all three places, as Gupta and Anumanchipalli (2024, arXiv:2403.07175) argue; the
original mixture (averaged key for the direction, bare key for the value) is `value_at = "bare"`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.targets import TargetConfig


@dataclass(frozen=True)
class RomeConfig(ClosedFormConfig):
    """ROME: equality constraint, value at the MLP's output, one layer, one request at a time."""

    prefixes: tuple[tuple[int, int], ...] = ((10, 5), (10, 10))
    one_at_a_time: bool = True
    target: TargetConfig = field(default_factory=lambda: TargetConfig(place="mlp"))


class Rome(ClosedForm):
    """Rank-one model editing; several requests are written one after another."""

    name = "rome"
    depth = (5 / 28, 5 / 28)  # the papers' GPT-J and Llama layers
