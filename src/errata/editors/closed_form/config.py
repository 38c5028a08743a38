"""The numbers of the closed-form family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from errata.editors.closed_form.keys import Averaging
from errata.editors.closed_form.spread import SPREADS
from errata.editors.closed_form.targets import TargetConfig
from errata.editors.config import EditorConfig


@dataclass(frozen=True)
class ClosedFormConfig(EditorConfig):
    """Numbers of the closed-form family; each method's own defaults are in its file."""

    layers: tuple[int, ...] = ()
    """Edited blocks, ascending; targets are found at the last. Empty: the method's usual place,
    as a share of the depth."""
    relaxation: float = 0.0
    """Lambda of the solve: 0 is the equality constraint. In widths of the key, d_ff; in `absolute`
    units as it is, as MEMIT's mom2_update_weight."""
    units: Literal["relative", "absolute"] = "relative"
    """What `relaxation` is measured in."""
    spread: str = "even"
    """How the residual is divided among layers: a name in SPREADS."""
    averaging: Averaging = "mean"
    """How a request's key is averaged over contexts."""
    value_at: Literal["averaged", "bare"] = "averaged"
    """Where the written value is reckoned: at the averaged key itself (consistent), or at the bare
    prompt's key while the averaged key says when (ROME's original mixture)."""
    prefixes: tuple[tuple[int, int], ...] = ((5, 10),)
    """Random contexts beside the bare prompt: (how many, of how many tokens) each."""
    contexts: tuple[str, ...] = ()
    """Contexts given as text, instead of random ones; the bare prompt is always among them."""
    one_at_a_time: bool = False
    """Carry out requests one after another on the edited model instead of in one batch."""
    keep_going: bool = False
    """Leave out requests whose target fails, instead of failing as a whole."""
    target: TargetConfig = field(default_factory=TargetConfig)

    def __post_init__(self) -> None:
        """Refuse numbers that contradict each other."""
        super().__post_init__()
        self._not_negative("relaxation")
        self._require(
            self.spread in SPREADS, f"spread is one of {sorted(SPREADS)}, not {self.spread!r}."
        )
        mixture = self.value_at == "bare" and self.averaging != "bare"
        self._require(
            not mixture or self.one_at_a_time,
            "value_at = 'bare' mixes two keys, which only makes sense for one request at a time.",
        )
