"""How much of what is still missing each edited layer takes on itself: the edit distribution.

An axis of its own, independent of the objective (A Unified Framework for Model Editing,
section 3.2). At each layer, lowest first, the residual at the last layer is measured anew on the
model as edited so far and divided by the rule; at the last layer every rule divides by 1, so
that whatever is then still missing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

SPREADS: dict[str, Callable[[int], float]] = {
    "even": float,
    "root": math.sqrt,
}
"""Name -> divisor, given how many layers remain to be written, this one included.

`even` is MEMIT's rule (Meng et al. 2023, equation 20), `root` is PMET's. One layer alone needs
no rule.
"""
