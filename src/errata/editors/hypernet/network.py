"""What MEND and SaLEM share: fitting the network to chosen matrices, and editing with it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from errata.editors.config import EditorConfig
from errata.editors.hypernet.gradients import Decomposed, decompose, stacked
from errata.editors.hypernet.objective import ObjectiveConfig, Questions, example, outer_loss
from errata.editors.hypernet.training import Learner, TrainingConfig, train
from errata.editors.hypernet.transform import TransformConfig, Update
from errata.editors.trainable import Fit, Fitted, TrainingCases, frozen_copy
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.errors import FitError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import Case, Request, check_batch, unique


@dataclass(frozen=True)
class NetworkConfig(EditorConfig):
    """Numbers of the editors with MEND's network."""

    network: TransformConfig = field(default_factory=TransformConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


class NetworkEditor(Fitted):
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

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> WeightEdit:
        """Compute the change: one pass for the gradients of all requests, then the network.

        Raises:
            WrongModelError: it was fitted to another model.
            RequestError: there is no request, or two contradict each other.
            NotFiniteError: the loss or a gradient is NaN or infinite.
        """
        requests = unique(requests)
        check_batch(requests)
        self.check(lm)
        progress("gradients", 0, 1)
        changes = self.changes(lm, requests)
        progress("gradients", 1, 1)
        return WeightEdit.of(
            lm,
            {path: change.low_rank().to(dtype=torch.float32) for path, change in changes.items()},
            requests=requests,
            record=Record.of(
                lm,
                method=self.name,
                config=self.config,
                seed=self.config.seed,
                notes={"left out": [], "fit": self.fit.notes},
            ),
        )

    @torch.no_grad()
    def changes(self, lm: LanguageModel, requests: Sequence[Request]) -> dict[str, Decomposed]:
        """Each matrix' change in rows, owned by the requests."""
        gradients = decompose(lm, [example(r) for r in requests], self.update.paths)
        changes: dict[str, Decomposed] = self.update.to(lm.device)(gradients)
        return changes


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
    config: NetworkConfig,
    *,
    folder: Path | None,
    notes: Mapping[str, Any],
    progress: Progress,
) -> tuple[NetworkConfig, Fit, Update]:
    """Train a network for the MLP matrices of some blocks: what a `NetworkEditor` is made of.

    Args:
        lm: the model; it is left as it is.
        layers: the blocks.
        cases: what to learn from.
        config: the numbers.
        folder: where checkpoints are kept.
        notes: what else the editor's file should tell.
        progress: called with (stage, done, total).

    Raises:
        FitError: no case has neighbours, or the loss became NaN.
    """
    if config.objective.kept and not any(case.neighbours for case in cases.train):
        raise FitError(
            "no case to learn from has neighbours, so the editor cannot learn what must stay. Give "
            "cases that have some, such as CounterFact's, or set objective.kept = 0."
        )
    paths = tuple(p for layer in layers for p in (lm.mlp_in_path(layer), lm.mlp_out_path(layer)))
    lm.check_finite(paths)
    config = replace(config, layers=tuple(layers))
    update = Update.of(lm, paths, config.network, seed=config.seed)
    fit = Fit.of(lm, paths)
    trained = train(
        NetworkLearner(lm, update, config.objective),
        cases,
        config.training,
        seed=config.seed,
        folder=folder,
        identity={
            "base": fit.base,
            "network": config.network.to_dict(),
            "objective": config.objective.to_dict(),
        },
        progress=progress,
    )
    told = {
        "cases": {"train": len(cases.train), "validation": len(cases.validation)},
        "training": trained,
        "shapes": {path: tuple(weight_out_in(lm.module(path)).shape) for path in paths},
    }
    return config, fit.with_notes(told | dict(notes)), update
