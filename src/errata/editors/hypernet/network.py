"""What MEND and SaLEM share: fitting the network to chosen matrices, and editing with it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.editors.hypernet.gradients import decompose, stacked
from errata.editors.hypernet.learnt import LearntConfig, LearntEditor, fit_learner
from errata.editors.hypernet.objective import ObjectiveConfig, Questions, outer_loss
from errata.editors.hypernet.transform import TransformConfig, Update
from errata.editors.trainable import Fit, TrainingCases, frozen_copy
from errata.editors.training import Learner
from errata.editors.wordings import example
from errata.lm.load import LanguageModel
from errata.progress import Progress
from errata.requests import Case, Request


@dataclass(frozen=True)
class NetworkConfig(LearntConfig):
    """Numbers of the editors with MEND's network."""

    network: TransformConfig = field(default_factory=TransformConfig)


AConfig = TypeVar("AConfig", bound=NetworkConfig)


class NetworkEditor(LearntEditor):
    """An editor that passes gradients through a network which has learnt to make edits of them.

    The change of each matrix is low-rank by construction: a row for each token that has a gradient.
    Of several requests the changes add up, each as it would be alone.
    """

    config: NetworkConfig

    def __init__(self, config: NetworkConfig, fit: Fit, update: Update) -> None:
        """Keep a network.

        Args:
            config: its numbers, with the blocks that it edits.
            fit: how it was fitted.
            update: the network.
        """
        super().__init__(config, fit)
        self.update = update.eval().requires_grad_(False)

    @classmethod
    def restored(cls, config: NetworkConfig, fit: Fit, tensors: Mapping[str, Tensor]) -> Self:
        """The editor that a file holds."""
        shapes = {path: (shape[0], shape[1]) for path, shape in fit.notes["shapes"].items()}
        update = Update(shapes, config.network)
        update.load_state_dict(dict(tensors))
        return cls(config, fit, update)

    def tensors(self) -> dict[str, Tensor]:
        """The network's parameters and running moments."""
        return frozen_copy(self.update.state_dict())

    @torch.no_grad()
    def change(self, lm: LanguageModel, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The change of each matrix that carries out all requests."""
        gradients = decompose(lm, [example(r) for r in requests], self.update.paths)
        changes = self.update.to(lm.device)(gradients)
        return {path: rows.low_rank().to(dtype=torch.float32) for path, rows in changes.items()}


class NetworkLearner(Learner):
    """The network as the outer loop trains it."""

    def __init__(self, lm: LanguageModel, update: Update, config: ObjectiveConfig) -> None:
        """Train `update` on `lm`, which stays as it is.

        Args:
            lm: the model.
            update: the network.
            config: what counts how much.
        """
        super().__init__()
        self.lm = lm
        self.update = update
        self.config = config

    def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        """The outer loss: each case edits the model and is asked about the edited one."""
        questions = Questions.of(cases, draw, self.config)
        gradients = decompose(self.lm, questions.edits, self.update.paths)
        changes = stacked(self.update(gradients), len(cases))
        return outer_loss(self.lm, questions, changes, self.config)

    def rates(self) -> Mapping[str, float]:
        """Adam's learning rate for each parameter."""
        return {f"update.{name}": rate for name, rate in self.update.rates().items()}


def fit_network(
    lm: LanguageModel,
    layers: Sequence[int],
    cases: TrainingCases,
    config: AConfig,
    *,
    folder: Path | None,
    notes: Mapping[str, Any],
    progress: Progress,
) -> tuple[AConfig, Fit, Update]:
    """Train a network for the MLP matrices of some blocks (see `fit_learner`).

    Returns:
        What a `NetworkEditor` is made of.
    """
    config, fit, learner = fit_learner(
        lm,
        layers,
        cases,
        config,
        lambda paths: NetworkLearner(
            lm, Update.of(lm, paths, config.network, seed=config.seed), config.objective
        ),
        folder=folder,
        notes=notes,
        progress=progress,
    )
    return config, fit, learner.update
