"""KE's network: from what should change, in words, to a mask, an offset and a scale per weight.

De Cao et al. 2021, section 4.2, and the code that came with it. The words' embeddings, of the model
itself and frozen, run through a bidirectional LSTM; from its final states h, for a weight (d_out,
d_in) with gradient G,

    z = tanh(W1 tanh(W0 h))                            W0 shared, W1 and W2 of the weight's own
    a, c, b, d, eta = W2 z                             a, b (d_out);  c, d (d_in);  eta a number
    change = sigmoid(eta) * (m * softmax(a) c^T . G + o * softmax(b) d^T)

where . is entry by entry and W1, W2 are normalised by rows (weight norm). A mask of rank one only
weighs the rows that make up G, sum_t (softmax(a) . delta_t) (c . x_t)^T, and the offset is one row
more: the change is never dense. m and o are fixed units of measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from errata.editors.config import Config
from errata.editors.hypernet.gradients import Decomposed, joined


@dataclass(frozen=True)
class ConditionedConfig(Config):
    """Numbers of the network."""

    hidden: int = 256
    """States of the LSTM, in each direction (the original code's)."""
    condition: int = 1024
    """Width of what all weights share (the original code's)."""
    inner: int = 128
    """Width of what a weight has of its own (the original code's)."""
    units: Literal["relative", "absolute"] = "relative"
    """Whether a mask of 1 everywhere makes of a typical gradient a change as large as `scale` times
    what singular values the weight usually has, and an offset of 1 too; or both are `scale`, as in
    the original code."""
    scale: float = 0.4
    """How far a change can go. The original code: 1, absolute."""
    initial: Literal["descent", "random"] = "descent"
    """How the last projection begins: as one step of gradient descent whatever the words, or at
    random as in the original code, which has to learn which way is down."""
    learning_rate: float = 3e-3
    """Of Adam, for all parameters. The original code: 3e-4, for 50,000 steps and more."""

    def __post_init__(self) -> None:
        """Refuse what makes no network."""
        super().__post_init__()
        self._positive("hidden", "condition", "inner", "scale", "learning_rate")


@dataclass(frozen=True)
class Masks:
    """What the network says of n edits of one weight."""

    rows: Tensor
    """(n, d_out) softmax(a): what the mask makes of rows."""
    columns: Tensor
    """(n, d_in) c: what it makes of columns."""
    offset_rows: Tensor
    """(n, d_out) softmax(b)."""
    offset_columns: Tensor
    """(n, d_in) d."""
    gate: Tensor
    """(n,) sigmoid(eta)."""

    def __call__(self, gradient: Decomposed, mask: Tensor, offset: Tensor) -> Decomposed:
        """The changes, in rows: the gradients' own, weighed, and one more for each edit.

        Args:
            gradient: rows of the n gradients.
            mask: m, a number.
            offset: o, a number.
        """
        of = gradient.owner
        masked = Decomposed(
            self.columns[of] * gradient.inputs,
            mask * self.gate[of, None] * self.rows[of] * gradient.deltas,
            of,
        )
        added = Decomposed(
            self.offset_columns,
            offset * self.gate[:, None] * self.offset_rows,
            torch.arange(len(self.gate), device=of.device),
        )
        return joined([masked, added])


class Conditioned(nn.Module):
    """The network; made at random by a seed, without touching torch's own random state."""

    units: Tensor

    def __init__(
        self,
        width: int,
        shapes: Mapping[str, tuple[int, int]],
        config: ConditionedConfig,
        *,
        seed: int = 0,
    ) -> None:
        """A network for some weights; its units are 0 until they are set or loaded.

        Args:
            width: of the model's embeddings.
            shapes: (d_out, d_in) of each weight, by module path.
            config: its numbers.
            seed: of its parameters.
        """
        super().__init__()
        self.paths = tuple(shapes)
        self.sizes = [(d_out, d_in, d_out, d_in, 1) for d_out, d_in in shapes.values()]
        self.learning_rate = config.learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lstm = nn.LSTM(width, config.hidden, batch_first=True, bidirectional=True)
            self.shared = nn.Linear(2 * config.hidden, config.condition)
            self.first = nn.ModuleList(
                weight_norm(nn.Linear(config.condition, config.inner)) for _ in shapes
            )
            self.last = nn.ModuleList(
                weight_norm(nn.Linear(config.inner, sum(sizes))) for sizes in self.sizes
            )
        if config.initial == "descent":
            for layer, (d_out, d_in, *_) in zip(self.last, self.sizes, strict=True):
                _begin_with_descent_(layer, slice(d_out, d_out + d_in))
        self.register_buffer("units", torch.zeros(len(shapes), 2))

    def measure_in_(self, units: Sequence[tuple[float, float]]) -> None:
        """Set m and o of each weight."""
        self.units.copy_(torch.tensor(units))

    def forward(self, words: Tensor, lengths: Sequence[int]) -> dict[str, Masks]:
        """What becomes of each weight's gradients.

        Args:
            words: (n, t, width) embeddings of what should change, padded at the right.
            lengths: (n) how many of the t are real.
        """
        packed = pack_padded_sequence(
            words, torch.tensor(lengths), batch_first=True, enforce_sorted=False
        )
        _, (states, _) = self.lstm(packed)
        condition = torch.tanh(self.shared(torch.cat([states[0], states[1]], dim=-1)))
        found = {}
        for path, sizes, first, last in zip(
            self.paths, self.sizes, self.first, self.last, strict=True
        ):
            a, c, b, d, eta = last(torch.tanh(first(condition))).split(sizes, dim=-1)
            found[path] = Masks(a.softmax(-1), c, b.softmax(-1), d, eta.sigmoid()[:, 0])
        return found

    def changes(
        self, gradients: Mapping[str, Decomposed], words: Tensor, lengths: Sequence[int]
    ) -> dict[str, Decomposed]:
        """Each weight's changes, in rows, of n edits."""
        masks = self(words, lengths)
        return {
            path: masks[path](gradients[path], *self.units[number].unbind())
            for number, path in enumerate(self.paths)
        }

    def rates(self) -> dict[str, float]:
        """Adam's learning rate for each parameter."""
        return {name: self.learning_rate for name, _ in self.named_parameters()}


@torch.no_grad()
def _begin_with_descent_(layer: nn.Module, mask_columns: slice) -> None:
    """Let the projection give -1 for the mask's columns and 0 for all else, whatever goes in.

    Its rows have length 0; their directions stay, so that they learn from the first step on.
    """
    layer.parametrizations["weight"].original0.zero_()  # type: ignore[index, union-attr]
    assert isinstance(layer.bias, Tensor)
    layer.bias.zero_()
    layer.bias[mask_columns] = -1.0
