"""MEND's network: from a gradient, in rows, to a change of the weight, in as many rows.

Mitchell et al. 2022, section 3, and the code that came with it. For a weight W (d_out, d_in), each
row of its gradient is a pair x (d_in), delta (d_out), and

    x^ = (x - mean) / (std + 1e-7),  delta^ likewise         running mean and std over all rows seen
    h = concat(x^, delta^)
    h <- h + max(0, s * (U V h + b) + o)                     twice; s, o of the weight's own
    x~, delta~ = h, divided again
    W <- W - step * sum_t delta~_t x~_t^T                     step of the weight's own, learnt

Weights of one shape share one network but for s, o and the step. U begins at 0, so that at first
the network passes its input on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from errata.editors.config import Config
from errata.editors.hypernet.gradients import Decomposed
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in

EPSILON = 1e-7
"""Added to each standard deviation (the original code's)."""

LAYERS = 2
"""How many residual layers a network has (the original code's)."""


@dataclass(frozen=True)
class TransformConfig(Config):
    """Numbers of the network."""

    rank: int = 1920
    """Of U and V, at most; never more than d_in + d_out."""
    normalise: bool = True
    """Bring each coordinate of the rows to mean 0 and variance 1."""
    initial: Literal["xavier", "normal"] = "xavier"
    """How V begins: Glorot's way (SaLEM's paper), or with variance 1 (MEND's code)."""
    units: Literal["relative", "absolute"] = "relative"
    """Whether `step` is measured in the weight's root mean square, and `learning_rate` in what a
    step moves a normalised coordinate by; or both are as they are (MEND's code)."""
    step: float = 0.005
    """How far the first step goes, for each row. MEND's code: 1e-4, absolute."""
    learning_rate: float = 0.05
    """Of the network. MEND's code: 1e-6, absolute."""
    step_learning_rate: float = 0.3
    """Of the steps; relative to `step` if units are relative. MEND's code: 1e-4, absolute."""
    sign: Literal["descent", "ascent"] = "descent"
    """Whether the update is subtracted, or added as in MEND's first code, which had to unlearn it;
    for networks that were trained with that."""

    def __post_init__(self) -> None:
        """Refuse what makes no network."""
        super().__post_init__()
        self._positive("rank")
        self._not_negative("step", "learning_rate", "step_learning_rate")


class RunningMoments(nn.Module):
    """Mean and standard deviation of each coordinate over all rows seen: Welford's, exact."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def see(self, rows: Tensor) -> None:
        """Take in (T, width) rows; the same as one after another."""
        if not len(rows):
            return
        rows = rows.to(self.mean)
        mean = rows.mean(dim=0)
        total, moved = self.count + len(rows), mean - self.mean
        self.squares += (rows - mean).square().sum(dim=0)
        self.squares += moved.square() * self.count * len(rows) / total
        self.mean += moved * len(rows) / total
        self.count.copy_(total)

    def forward(self, rows: Tensor) -> Tensor:
        """The rows with mean 0 and variance 1."""
        std = (self.squares / (self.count - 1).clamp(min=1)).sqrt()
        return (rows - self.mean.to(rows)) / (std.to(rows) + EPSILON)


class LRLinear(nn.Module):
    """h + max(0, s * (U V h + b) + o): a low-rank residual layer, at first the identity.

    The gradient of the clamp is 1 at 0, where it begins, so that U learns from the first step on.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        modes: int,
        *,
        initial: str = "xavier",
        generator: torch.Generator | None = None,
    ) -> None:
        """A layer for `modes` weights.

        Args:
            width: of h.
            rank: of U V.
            modes: how many weights share the layer, each with s and o of its own.
            initial: how V begins.
            generator: what V is drawn from.
        """
        super().__init__()
        rank = min(rank, width)
        spread = math.sqrt(2 / (width + rank)) if initial == "xavier" else 1.0
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(spread * torch.randn(rank, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.shift = nn.Parameter(torch.zeros(modes, width))

    def forward(self, h: Tensor, mode: int) -> Tensor:
        """(T, width) -> (T, width), for the weight numbered `mode`."""
        inside = h @ self.v.mT @ self.u.mT + self.bias
        return h + (self.scale[mode] * inside + self.shift[mode]).clamp(min=0)


class GradientTransform(nn.Module):
    """The network for all weights of one shape."""

    def __init__(
        self,
        d_out: int,
        d_in: int,
        modes: int,
        config: TransformConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        """A network that passes on what it is given.

        Args:
            d_out: rows of the weight.
            d_in: columns of the weight.
            modes: how many weights of this shape there are.
            config: its numbers.
            generator: what the V are drawn from.
        """
        super().__init__()
        self.normalise = config.normalise
        self.inputs, self.deltas = RunningMoments(d_in), RunningMoments(d_out)
        self.layers = nn.ModuleList(
            LRLinear(d_in + d_out, config.rank, modes, initial=config.initial, generator=generator)
            for _ in range(LAYERS)
        )

    def forward(self, rows: Decomposed, mode: int) -> Decomposed:
        """x~ and delta~ of each row; while training, the running moments see the rows first."""
        x, delta = rows.inputs, rows.deltas
        if self.training:
            self.inputs.see(x)
            self.deltas.see(delta)
        if self.normalise:
            x, delta = self.inputs(x), self.deltas(delta)
        h = torch.cat([x, delta], dim=1)
        for layer in self.layers:
            h = layer(h, mode)
        return Decomposed(h[:, : x.shape[1]], h[:, x.shape[1] :], rows.owner)


class Update(nn.Module):
    """From the gradients of some weights to their changes: MEND's network with its steps."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], config: TransformConfig, *, seed: int = 0
    ) -> None:
        """A network that has learnt nothing; its steps are 0 until `begin` or a checkpoint.

        Args:
            shapes: (d_out, d_in) of each weight, by module path.
            config: its numbers.
            seed: of the V.
        """
        super().__init__()
        self.config = config
        self.paths = tuple(shapes)
        self.sign = -1.0 if config.sign == "descent" else 1.0
        groups: dict[str, list[str]] = {}
        for path, (d_out, d_in) in shapes.items():
            groups.setdefault(f"{d_out}x{d_in}", []).append(path)
        generator = torch.Generator().manual_seed(seed)
        self.transforms = nn.ModuleDict(
            {
                name: GradientTransform(*shapes[members[0]], len(members), config, generator)
                for name, members in groups.items()
            }
        )
        self._place = {
            path: (name, mode) for name, some in groups.items() for mode, path in enumerate(some)
        }
        self.steps = nn.Parameter(torch.ones(len(shapes)))
        self.units: Tensor
        self.register_buffer("units", torch.zeros(len(shapes)))

    @classmethod
    def of(
        cls, lm: LanguageModel, paths: tuple[str, ...], config: TransformConfig, *, seed: int = 0
    ) -> Update:
        """A network for some of a model's weights, with its first steps."""
        weights = {path: weight_out_in(lm.module(path)) for path in paths}
        made = cls(
            {path: (w.shape[0], w.shape[1]) for path, w in weights.items()}, config, seed=seed
        )
        for number, weight in enumerate(weights.values()):
            relative = config.units == "relative"
            rms = float(weight.double().square().mean().sqrt()) if relative else 1.0
            made.units[number] = config.step * rms
        return made.to(lm.device)

    def forward(self, gradients: Mapping[str, Decomposed]) -> dict[str, Decomposed]:
        """Each weight's change, in rows: its deltas are -step * delta~."""
        changes = {}
        for number, path in enumerate(self.paths):
            name, mode = self._place[path]
            found: Decomposed = self.transforms[name](gradients[path], mode)
            step = self.sign * self.units[number] * self.steps[number]
            changes[path] = Decomposed(found.inputs, step * found.deltas, found.owner)
        return changes

    def rates(self) -> dict[str, float]:
        """The learning rate of each parameter.

        Relative ones are such that one step of Adam moves a normalised coordinate by about
        `learning_rate` through any of U, V, b and o, whatever the width: an entry of U meets `rank`
        others, one of V `width`.
        """
        config = self.config
        relative = config.units == "relative"
        # Steps are kept as multiples of the first one, which absolute rates know nothing of.
        factor = 1.0 if relative or not config.step else 1 / config.step
        rates = {}
        for name, parameter in self.named_parameters():
            meets = parameter.shape[1] if name.endswith((".u", ".v")) and relative else 1
            rates[name] = config.learning_rate / meets
        return rates | {"steps": config.step_learning_rate * factor}
