"""Training one edit's neurons: the losses of Transformer-Patcher and the descent on them.

Huang et al. 2023, arXiv:2301.09785, section 3.3. An edit has a neuron for each wrongly predicted
token, with the query q of that token (what goes into the MLP there). With a = K q + b how its own
token drives each neuron, A = K M + b how the hidden states M of ordinary text do, and mean_k the
mean of the k largest,

    L = edit + a_L * mean_5 exp(act_margin - a) + m_L * [ mean_1000 exp(A - beta)
                                                          + mean_1000 exp(A - a - gamma) ]

so that a neuron fires on its own token, is far below zero (beta = -3) on all other text, and far
below where its own token drives it (gamma = -3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from errata.algebra.neurons import Neurons
from errata.editors.config import Config
from errata.errors import NotFiniteError

CHECK_EVERY = 25
"""Updates between two looks at whether to stop or slow down (the authors' code)."""


@dataclass(frozen=True)
class PatchConfig(Config):
    """How an edit's neurons are trained."""

    updates: int = 500
    """At most so many updates of Adam (the authors' code: 2000)."""
    check_from: int = 100
    """From this update on, training ends once the answer is right and the memory loss stands
    still."""
    units: Literal["relative", "absolute"] = "relative"
    """Whether `learning_rate` is how far one update moves what drives a neuron, and a value in
    root mean squares of the MLP's output, which `amplify` is a multiple of too; or both are as
    they are (the authors' code)."""
    learning_rate: float = 0.1
    """Of Adam; halved where the loss no longer falls. The authors' code: 0.01, absolute."""
    amplify: float = 1.0
    """How large values begin. The authors' code: 10, absolute."""
    weight_decay: float = 0.01
    """Adam's pull of the neurons towards zero."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    smoothing: float = 0.0
    """Label smoothing of the answer's loss (the authors' code for BART: 0.1)."""
    activation: float = 1.0
    """a_L, of firing on the own token."""
    memory: float = 5.0
    """m_L, of silence on ordinary text."""
    act_margin: float = 0.0
    """Where the own token should drive a neuron, at least."""
    beta: float = -3.0
    """Where ordinary text should drive it, at most. (The authors' code passes zeros for BART.)"""
    gamma: float = -3.0
    """The same, measured from where the own token drives it."""
    loudest_own: int = 5
    """Over how many of the own tokens' terms the mean is taken: the largest ones."""
    loudest: int = 250
    """The same for ordinary text, of 10,000 tokens (the authors' code: 1000, of 40,000)."""

    def __post_init__(self) -> None:
        """Refuse numbers without sense."""
        super().__post_init__()
        self._at_least_one("updates", "loudest_own", "loudest")


def activation_loss(own: Tensor, config: PatchConfig) -> Tensor:
    """mean_5 exp(act_margin - a).

    Args:
        own: (n,) how each neuron is driven by its own token.
        config: margin and k.
    """
    return (config.act_margin - own).topk(min(config.loudest_own, len(own))).values.exp().mean()


def memory_loss(neurons: Neurons, old: Tensor, own: Tensor, config: PatchConfig) -> Tensor:
    """mean_1000 exp(A - beta) + mean_1000 exp(A - a - gamma).

    Gradients go back through the loudest alone, as those of the others are zero.

    Args:
        neurons: n of them.
        old: (m, d_in) hidden states of ordinary text.
        own: (n,) how each neuron is driven by its own token.
        config: margins and k.
    """
    with torch.no_grad():
        drives = neurons.drives(old)
        absolute, beside = (_largest(some, config.loudest) for some in (drives, drives - own))

    def driven(states: Tensor, which: Tensor) -> Tensor:
        return neurons.drives(old.index_select(0, states)).gather(1, which[:, None])

    return (driven(*absolute) - config.beta).exp().mean() + (
        driven(*beside) - own[beside[1], None] - config.gamma
    ).exp().mean()


def first_neurons(queries: Tensor, d_out: int, *, amplify: float, seed: int) -> Neurons:
    """Neurons that their own tokens drive to exactly 1: k = q / |q|^2, b = 0; values at random.

    Args:
        queries: (n, d_in) what goes into the MLP at each wrong token.
        d_out: width of what comes out of it.
        amplify: standard deviation of the values.
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    values = amplify * torch.randn(len(queries), d_out, generator=generator)
    return Neurons(
        queries / queries.square().sum(dim=1, keepdim=True),
        queries.new_zeros(len(queries)),
        values.to(queries),
    )


@dataclass(frozen=True)
class Patched:
    """What became of an edit's neurons."""

    neurons: Neurons
    updates: int
    right: bool
    """Whether every token of the answer is the top prediction."""
    edit: float
    """The answer's loss, in nats a token."""
    memory: float
    """The memory loss."""
    own: list[float]
    """How each neuron is driven by its own token."""


def train_neurons(
    neurons: Neurons,
    queries: Tensor,
    old: Tensor,
    answer: Callable[[Neurons], tuple[Tensor, bool]],
    rms: float,
    config: PatchConfig,
) -> Patched:
    """Descend on the loss, from the given neurons.

    Args:
        neurons: where to begin.
        queries: (n, d_in) their own tokens' hidden states.
        old: (m, d_in) hidden states of ordinary text; m may be 0.
        answer: the answer's loss with some neurons, with gradient, and whether all of it is right.
        rms: root mean square of the MLP's output.
        config: the numbers.

    Returns:
        The neurons as the last update left them; where there are none, what the model says.

    Raises:
        NotFiniteError: the loss became NaN or infinite.
    """
    keys, biases, values = parameters = [
        nn.Parameter(tensor.clone()) for tensor in (neurons.keys, neurons.biases, neurons.values)
    ]
    now, relative = Neurons(keys, biases, values), config.units == "relative"
    reach = float(queries.abs().sum(dim=1).mean()) if relative else 1.0
    rates = {keys: 1 / reach, biases: 1.0, values: rms if relative else 1.0}
    adam = torch.optim.Adam(
        [{"params": [p], "lr": config.learning_rate * rate} for p, rate in rates.items()],
        weight_decay=config.weight_decay,
        fused=True,
    )
    slower = torch.optim.lr_scheduler.ReduceLROnPlateau(
        adam, factor=0.5, patience=1, threshold=0.05
    )
    lowest, done = float("inf"), 0
    while True:
        edit, right = answer(now)
        own = (queries * now.keys).sum(dim=1) + now.biases
        silence = memory_loss(now, old, own, config) if len(old) else edit.new_zeros(())
        loss = edit + config.activation * activation_loss(own, config) + config.memory * silence
        if not loss.isfinite():
            raise NotFiniteError(
                f"training a neuron left all bounds after {done} updates: the loss is "
                f"{float(loss.detach())}. Lower patch.learning_rate, which is "
                f"{config.learning_rate}."
            )
        if done % CHECK_EVERY == 0:
            slower.step(float(loss.detach()))
            still = float(silence.detach()) > lowest - 0.001
            lowest = min(lowest, float(silence.detach()))
            if done >= config.check_from and right and still:
                break
        if done == config.updates:
            break
        adam.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, config.clip)
        adam.step()
        done += 1
    told = Neurons(*(parameter.detach() for parameter in parameters))
    return Patched(
        told, done, right, float(edit.detach()), float(silence.detach()), own.detach().tolist()
    )


def _largest(drives: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the largest entries."""
    at = drives.flatten().topk(min(count, drives.numel()), sorted=False).indices
    return at // drives.shape[1], at % drives.shape[1]
