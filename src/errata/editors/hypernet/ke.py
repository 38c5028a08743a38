"""KE: a network that reads what should change and makes of a gradient the change (De Cao et al.).

"Editing Factual Knowledge in Language Models", 2021, arXiv:2104.08164. The network
(`conditioned.py`) reads "{old answer} >> {new answer} || {prompt}". It is trained to lower the loss
of the new answer while the divergence on what must stay is at most a margin,

    min over the network, max over alpha >= 0 of   L_edit + alpha * (KL(before || after) - margin) ,

alpha by gradient ascent (their section 4.1). The margin shrinks whenever validation edits succeed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.editors.config import Config
from errata.editors.hypernet.conditioned import Conditioned, ConditionedConfig
from errata.editors.hypernet.gradients import Decomposed, decompose, stacked, typical
from errata.editors.hypernet.learnt import (
    LearntConfig,
    LearntEditor,
    fit_learner,
    shapes,
    usual_change,
)
from errata.editors.hypernet.objective import Questions, outer_loss
from errata.editors.trainable import Fit, Trainable, TrainingCases, frozen_copy
from errata.editors.training import Learner
from errata.editors.wordings import example
from errata.lm.load import LanguageModel
from errata.lm.loss import predictions
from errata.lm.tokens import encode, pad
from errata.progress import Progress, silent
from errata.requests import Case, Request

OLD_TOKENS = 4
"""How much of what a decoder says today is told, where a request does not say it."""


@dataclass(frozen=True)
class ConstraintConfig(Config):
    """How much may change of what must stay."""

    margin: float = 0.1
    """Of the divergence, in nats, at first (the original code's for BERT)."""
    lowest: float = 0.001
    """No margin is smaller than that (the original code's for BERT)."""
    shrink: float = 0.8
    """By what the margin is multiplied after a validation that went well (the original code's)."""
    success: float = 0.9
    """Which share of validation answers must come for that (the original code's)."""
    rate: float = 0.1
    """Of the multiplier's gradient ascent, in 1 / nats (the original code's)."""

    def __post_init__(self) -> None:
        """Refuse what makes no constraint."""
        super().__post_init__()
        self._not_negative("margin", "lowest", "rate")
        self._require(0 < self.shrink <= 1, f"shrink is in (0, 1], got {self.shrink}.")


@dataclass(frozen=True)
class KeConfig(LearntConfig):
    """KE's numbers. Its `objective` says what is asked, and by what validation judges."""

    network: ConditionedConfig = field(default_factory=ConditionedConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)


class FittedKe(LearntEditor):
    """KE, fitted. Of several requests the changes add up, each as it would be alone."""

    name = "ke"
    config: KeConfig

    def __init__(self, config: KeConfig, fit: Fit, network: Conditioned) -> None:
        """Keep a network.

        Args:
            config: its numbers, with the blocks that it edits.
            fit: how it was fitted.
            network: the network.
        """
        super().__init__(config, fit)
        self.network = network.eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """The network's parameters and units."""
        return frozen_copy(self.network.state_dict())

    @torch.no_grad()
    def change(self, lm: LanguageModel, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The change of each matrix that carries out all requests."""
        changes = conditioned(lm, self.network.to(lm.device), requests)
        return {path: rows.low_rank().to(dtype=torch.float32) for path, rows in changes.items()}


class KeLearner(Learner):
    """The network as the outer loop trains it, with its multiplier and margin."""

    multiplier: Tensor
    margin: Tensor

    def __init__(self, lm: LanguageModel, network: Conditioned, config: KeConfig) -> None:
        """Train `network` on `lm`, which stays as it is.

        Args:
            lm: the model.
            network: the network.
            config: the numbers.
        """
        super().__init__()
        self.lm = lm
        self.network = network
        self.config = config
        self.register_buffer("multiplier", torch.ones((), device=lm.device))
        self.register_buffer("margin", torch.tensor(config.constraint.margin, device=lm.device))

    def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        """In training the Lagrangian, after which the multiplier takes its step.

        In validation it is the objective's fixed sum: the Lagrangian's weights move, so that its
        values at different steps cannot be compared.
        """
        questions = Questions.of(cases, draw, self.config.objective)
        changes = conditioned(self.lm, self.network, [case.request for case in cases])
        found = outer_loss(self.lm, questions, stacked(changes, len(cases)), self.config.objective)
        if self.training:
            beyond = found["kept"] - self.margin
            found["loss"] = found["edit"] + self.multiplier * beyond
            step = self.config.constraint.rate * beyond.detach()
            self.multiplier = (self.multiplier + step).clamp(min=0)
        return found | {"multiplier": self.multiplier, "margin": self.margin}

    def validated(self, means: Mapping[str, float]) -> None:
        """Hold the constraint tighter once edits succeed."""
        constraint = self.config.constraint
        if means["accuracy"] > constraint.success:
            self.margin.mul_(constraint.shrink).clamp_(min=constraint.lowest)

    def rates(self) -> Mapping[str, float]:
        """Adam's learning rate for each parameter."""
        return {f"network.{name}": rate for name, rate in self.network.rates().items()}


class Ke(Trainable):
    """KE, to be fitted."""

    name = "ke"
    depth = (0.0, 1.0)
    config: KeConfig

    def fit(
        self,
        lm: LanguageModel,
        cases: TrainingCases,
        *,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> FittedKe:
        """Train the network (see `Trainable.fit`)."""
        config, fit, learner = fit_learner(
            lm,
            self.layers(lm),
            cases,
            self.config,
            lambda paths: KeLearner(lm, begun(lm, paths, cases.train, self.config), self.config),
            folder=folder,
            progress=progress,
        )
        width = {"embedding": learner.network.lstm.input_size}
        return FittedKe(config, fit.with_notes(width), learner.network)

    def restored(self, fit: Fit, tensors: Mapping[str, Tensor]) -> FittedKe:
        """The editor that a file holds."""
        sizes = {path: (shape[0], shape[1]) for path, shape in fit.notes["shapes"].items()}
        network = Conditioned(fit.notes["embedding"], sizes, self.config.network)
        network.load_state_dict(dict(tensors))
        return FittedKe(self.config, fit, network)


def begun(
    lm: LanguageModel, paths: tuple[str, ...], cases: Sequence[Case], config: KeConfig
) -> Conditioned:
    """A network that has learnt nothing yet, with its units of measure.

    With m * softmax(a) c^T for a = 0 and c = 1 a typical gradient is as large a change as `scale`
    times what singular values the weight usually has; o * softmax(b) d^T too.
    """
    sizes = shapes(lm, paths)
    width = int(words(lm, [cases[0].request])[0].shape[-1])
    network = Conditioned(width, sizes, config.network, seed=config.seed)
    scale = config.network.scale
    units = [(scale, scale)] * len(paths)
    if config.network.units == "relative":
        usual = typical(lm, [example(case.request) for case in cases], paths)
        units = []
        for path, (d_out, _) in sizes.items():
            offset = scale * usual_change(lm, path) * d_out
            units.append((offset / usual[path] if usual[path] else 0.0, offset))
    network.measure_in_(units)
    return network.to(lm.device)


def conditioned(
    lm: LanguageModel, network: Conditioned, requests: Sequence[Request]
) -> dict[str, Decomposed]:
    """Each matrix' change in rows, owned by the requests."""
    gradients = decompose(lm, [example(request) for request in requests], network.paths)
    return network.changes(gradients, *words(lm, requests))


@torch.no_grad()
def words(lm: LanguageModel, requests: Sequence[Request]) -> tuple[Tensor, list[int]]:
    """What the network reads: (n, t, width) embeddings, and how many of the t are real.

    Raises:
        TokenizationError: a text is longer than the model can read.
    """
    rows = encode(lm, conditions(lm, requests))
    embedded = lm.embedding(pad(lm, rows).ids)
    assert isinstance(embedded, Tensor)
    return embedded.float(), [len(row) for row in rows]


def conditions(lm: LanguageModel, requests: Sequence[Request]) -> list[str]:
    """What should change, in words; what is said today is asked where a request does not say it."""
    asked = [request.text for request in requests if not request.true]
    said = iter(predictions(lm, asked, new_tokens=OLD_TOKENS) if asked else [])
    return [
        f"{request.true or next(said)} >> {request.target} || {request.text}"
        for request in requests
    ]
