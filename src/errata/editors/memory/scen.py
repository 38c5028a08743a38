"""SCEN: an expert network for each edit, and a neuron that knows when it is asked for.

Yao et al. 2024, "Scalable Model Editing via Customized Expert Networks", arXiv:2404.02699. Two
stages, one edit after another:

1. the expert: a copy of one matrix W, trained by a few updates of Adam on that edit alone (the mean
   loss of its answer's tokens);
2. the indexing neuron w, trained on the matrix' input q at the prompt's last token. With
   a_t = sigmoid(w q_t) of the edit itself and a_i = sigmoid(w q_i) of the t - 1 earlier ones,

       l_activate    = exp(-a_t)                                          (5)
       l_disactivate = mean_i exp(a_i + alpha)                            (6)
       l_margin      = mean_i exp(a_i - a_t + beta)                       (7)
       loss          = l_activate + m (l_disactivate + l_margin)          (8)

Merging and routing (equations 9 to 12) are the memory's (`errata.edits.memories.experts`).

alpha and beta multiply in (6) and (7). The reference code adds them outside of exp, where they have
no gradient (`loss = "reference"`). As margins, which their name suggests, they would be
max(0, a_i + alpha - 1) and max(0, a_i - a_t + beta) (`loss = "hinge"`).

The paper keeps all of an expert's matrix. Here the difference to W alone is kept, as its nearest
matrix of rank `rank`; the notes tell how much of it that misses.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.editors.config import EditorConfig
from errata.editors.difference import borrowed, factors
from errata.editors.editor import Editor
from errata.edits.edit import Record
from errata.edits.memories.experts import Experts
from errata.edits.memories.memory import Place
from errata.edits.memory import MemoryEdit, memory_at, set_aside
from errata.errors import ConfigError, NotFiniteError
from errata.lm.forward import Replay
from errata.lm.hooks import attached
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, losses
from errata.lm.prompts import current
from errata.progress import Progress, silent
from errata.requests import Request, check_batch, unique

KIND = "experts"


@dataclass(frozen=True)
class ScenConfig(EditorConfig):
    """Numbers of SCEN."""

    layers: tuple[int, ...] = ()
    """The one block with experts. Empty: the paper's place, block 20 of 32, as a share of the
    depth."""
    matrix: Literal["attention_out", "mlp_in", "mlp_out"] = "mlp_out"
    """Which matrix has experts (the rows of the paper's Table 3); neurons see what goes into it."""
    edits_per_expert: int = 1
    """How many requests of one edit share an expert and its neuron (the paper's Table 4)."""
    rank: int | None = 8
    """Of an expert's difference to the model's own matrix; None keeps all of it."""
    threshold: float = 0.65
    """Above which activation an expert takes over (theta)."""
    updates: int = 10
    """Of an expert."""
    learning_rate: float = 0.01
    """Of an expert; in `relative` units a multiple of the matrix's root-mean-square entry."""
    neuron_updates: int = 20
    """Of an indexing neuron."""
    neuron_learning_rate: float = 0.1
    """Of a neuron; in `relative` units, by how much one update may move the neuron's answer to its
    own prompt, before the sigmoid."""
    units: Literal["relative", "absolute"] = "relative"
    """What both learning rates are measured in; the paper's numbers are `absolute`."""
    loss: Literal["paper", "reference", "hinge"] = "paper"
    """What the neurons' constants do: they multiply, do nothing, or are margins."""
    disactivate: bool = True
    """Whether earlier prompts are to leave a neuron silent (equation 6)."""
    margin: bool = True
    """Whether they are to stay below the neuron's own prompt (equation 7)."""
    balance: float = 1.0
    """How much both count against activation (m)."""
    alpha: float = 0.7
    """The constant of disactivation."""
    beta: float = 0.3
    """The constant of the margin."""
    seed: int = 0
    """Of where neurons begin."""

    def __post_init__(self) -> None:
        """Refuse numbers without sense."""
        super().__post_init__()
        self._at_least_one("edits_per_expert", "updates", "neuron_updates")
        self._positive("learning_rate", "neuron_learning_rate")
        self._require(
            self.rank is None or self.rank >= 1,
            f"rank must be at least 1, or None for the whole difference, got {self.rank}.",
        )
        self._require(
            0 < self.threshold < 1, f"threshold must be between 0 and 1, got {self.threshold}."
        )


class Scen(Editor):
    """An expert and a neuron for each request, or for some together."""

    name = "scen"
    depth = (20 / 32, 20 / 32)  # the paper's block of Llama-2-7B
    config: ScenConfig

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The one block with experts.

        Raises:
            ConfigError: there are several, or it is beyond the model's depth.
        """
        if len(self.config.layers) > 1:
            raise ConfigError(f"experts stand in one block, not in {self.config.layers}.")
        return super().layers(lm)

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> MemoryEdit:
        """Train experts and neurons, one after another, each against all earlier prompts.

        Args:
            lm: the model; the prompts of experts that it has already are the earlier ones.
            requests: what it is to say.
            progress: called with (stage, done, total).

        Raises:
            ConfigError: the model has no such layer.
            RequestError: there is no request, or two contradict each other.
            NotFiniteError: the model, or the training, gives NaN or infinity.
            TokenizationError: a prompt or target has no token of its own, or is too long.
        """
        requests = unique(requests)
        check_batch(requests)
        (layer,) = self.layers(lm)
        places = {
            "attention_out": lm.attention_out_path,
            "mlp_in": lm.mlp_in_path,
            "mlp_out": lm.mlp_out_path,
        }
        path, settings = places[self.config.matrix](layer), {"threshold": self.config.threshold}
        lm.check_editable([path])
        memory = memory_at(lm, KIND, path, settings) or Experts(Place(lm, path, settings))
        assert isinstance(memory, Experts)
        seen = memory.prompts_without([request.text for request in requests])
        size = self.config.edits_per_expert
        groups = [
            list(range(i, min(i + size, len(requests)))) for i in range(0, len(requests), size)
        ]
        made: list[_Expert] = []
        with set_aside(lm, KIND, path):
            for done, group in enumerate(groups):
                one = self._expert(lm, layer, path, [requests[i] for i in group], seen)
                made.append(one)
                seen = torch.cat([seen, one.prompts])
                progress("experts", done + 1, len(groups))
        notes = {
            "left out": [],
            "loss after": [one.loss for one in made],
            "error of the rank": [one.missed for one in made],
            "activation": [one.activation for one in made],
            "largest activation by earlier prompts": [one.rival for one in made],
        }
        config = self.config.to_dict() | {"layers": (layer,)}
        tensors = {
            "neurons": torch.stack([one.neuron for one in made]),
            "left": torch.stack([one.change.left for one in made]),
            "right": torch.stack([one.change.right for one in made]),
            "prompts": torch.stack([_filled(one.prompts, size) for one in made]),
        }
        return MemoryEdit.of(
            lm,
            KIND,
            path,
            {name: tensor.cpu() for name, tensor in tensors.items()},
            requests=requests,
            settings=settings,
            serves=groups,
            record=Record.of(
                lm, method=self.name, config=config, seed=self.config.seed, notes=notes
            ),
        )

    def _expert(
        self,
        lm: LanguageModel,
        layer: int,
        path: str,
        requests: Sequence[Request],
        seen: Tensor,
    ) -> _Expert:
        """Both stages, for requests that share an expert.

        Args:
            lm: the model, as if it had no experts.
            layer: the block of the matrix.
            path: of the matrix.
            requests: what the expert is for.
            seen: (t - 1, d_in) the matrix' inputs at earlier prompts.
        """
        examples = [Example(request.text, request.target) for request in requests]
        own = inputs_at_prompts(lm, path, examples)
        change, loss = self._trained(lm, layer, path, examples)
        kept, missed = factors(change, self.config.rank)
        text = "\n".join(request.text for request in requests)
        neuron = self.neuron(own, seen, zlib.crc32(text.encode()))
        return _Expert(
            kept.to(dtype=torch.float32),
            neuron,
            own,
            loss,
            missed,
            float((own @ neuron).sigmoid().min()),
            float((seen @ neuron).sigmoid().max()) if len(seen) else 0.0,
        )

    def _trained(
        self, lm: LanguageModel, layer: int, path: str, examples: Sequence[Example]
    ) -> tuple[Tensor, float]:
        """Stage 1: what training changes in the matrix (d_out, d_in), and the loss before its end.

        Raises:
            NotFiniteError: the loss is NaN or infinite.
        """
        below = Replay.of(lm, layer, lambda: losses(lm, examples))
        with borrowed(lm, [path]) as loan, below.told():
            (copy,), (own,) = loan.copies, loan.own
            unit = float(own.float().square().mean().sqrt()) if self._relative else 1.0
            adam = torch.optim.Adam([copy], lr=self.config.learning_rate * unit)
            for _ in range(self.config.updates):
                loss = losses(lm, examples).mean()
                _check(lm, loss)
                (slope,) = torch.autograd.grad(loss, loan.parameters)
                copy.grad = slope.to(copy.dtype)
                adam.step()
                loan.show_()
            return loan.moved()[path], float(loss.detach())

    def neuron(self, own: Tensor, seen: Tensor, number: int) -> Tensor:
        """Stage 2: an indexing neuron (d_in,) that answers to `own` and not to `seen`.

        Args:
            own: (k, d_in) the matrix' inputs at the prompts of its expert.
            seen: (t - 1, d_in) those at earlier prompts.
            number: with the seed, where the neuron begins.
        """
        generator = torch.Generator().manual_seed(self.config.seed + number)
        bound = own.shape[1] ** -0.5  # where a linear layer begins
        start = (torch.rand(own.shape[1], generator=generator) * 2 - 1) * bound
        neuron = start.to(own).requires_grad_(True)
        rate = self.config.neuron_learning_rate
        if self._relative:
            rate = rate / float(own.abs().sum(dim=1).mean().clamp(min=1e-12))
        adam = torch.optim.Adam([neuron], lr=rate)
        for _ in range(self.config.neuron_updates):
            loss = self._loss((own @ neuron).sigmoid(), (seen @ neuron).sigmoid())
            (neuron.grad,) = torch.autograd.grad(loss, [neuron])
            adam.step()
        trained: Tensor = neuron.detach()
        return trained

    def _loss(self, own: Tensor, seen: Tensor) -> Tensor:
        """Equation 8 of activations (k,) by the edit's own prompts and (t - 1,) by earlier ones."""
        config = self.config
        loss = torch.exp(-own).mean()
        if not len(seen):
            return loss
        beyond = seen[:, None] - own
        if config.loss == "hinge":
            silent_, below = (seen + config.alpha - 1).relu(), (beyond + config.beta).relu()
        elif config.loss == "reference":
            silent_, below = seen.exp() + config.alpha, seen.exp()[:, None] - own + config.beta
        else:
            silent_, below = (seen + config.alpha).exp(), (beyond + config.beta).exp()
        if config.disactivate:
            loss = loss + config.balance * silent_.mean()
        if config.margin:
            loss = loss + config.balance * below.mean()
        return loss

    @property
    def _relative(self) -> bool:
        return self.config.units == "relative"


@dataclass(frozen=True)
class _Expert:
    change: LowRank
    neuron: Tensor
    """(d_in,)"""
    prompts: Tensor
    """(k, d_in) the matrix' inputs at the prompts of its requests."""
    loss: float
    """Of the answers, before the expert's last update."""
    missed: float
    """By how much the factors miss the change, relative to its norm."""
    activation: float
    """Of its neuron by its own prompts, the smallest."""
    rival: float
    """Of its neuron by earlier prompts, the largest."""


@torch.no_grad()
def inputs_at_prompts(lm: LanguageModel, path: str, examples: Sequence[Example]) -> Tensor:
    """(n, d_in) what goes into a matrix at each prompt's last token, in float32 or wider."""
    found: list[Tensor] = []

    def look(states: Tensor, output: Tensor) -> Tensor:
        prompts = current(lm, path)
        at = torch.arange(len(states)), prompts.ends
        found.append(states[at].to(torch.promote_types(states.dtype, torch.float32)))
        return output

    with attached(lm.module(path), look):
        answer_logits(lm, examples)
    (inputs,) = found
    return inputs


def _filled(prompts: Tensor, count: int) -> Tensor:
    """(count, d_in) with zeros after the last."""
    return torch.cat([prompts, prompts.new_zeros(count - len(prompts), prompts.shape[1])])


def _check(lm: LanguageModel, loss: Tensor) -> None:
    if loss.isfinite():
        return
    lm.check_finite()
    raise NotFiniteError(
        f"the answers' loss is not finite while an expert is trained: the dtype of {lm.name} "
        "overflows (try float32 or bfloat16), or learning_rate is too high."
    )
