"""What all learnt editors share: the numbers of a fit, the fit itself, and editing with it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from errata.algebra.low_rank import LowRank
from errata.editors.config import EditorConfig
from errata.editors.hypernet.objective import ObjectiveConfig
from errata.editors.trainable import Fit, Fitted, TrainingCases
from errata.editors.training import Learner, TrainingConfig, train
from errata.editors.wordings import neighbours, wordings
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.errors import FitError
from errata.lm.load import LanguageModel
from errata.lm.loss import check_examples
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import Request, check_batch, unique

BLOCKS = 3
"""How many blocks are edited unless they are named."""


@dataclass(frozen=True)
class LearntConfig(EditorConfig):
    """Numbers of every learnt editor."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


AConfig = TypeVar("AConfig", bound=LearntConfig)
ALearner = TypeVar("ALearner", bound=Learner)


class LearntEditor(Fitted):
    """An editor that makes changes of matrices from the gradients of the requests."""

    config: LearntConfig

    @abstractmethod
    def change(self, lm: LanguageModel, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The change of each matrix that carries out all requests."""

    def notes(self, lm: LanguageModel) -> dict[str, Any]:
        """What an edit's record tells beside the fit."""
        return {}

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> WeightEdit:
        """Compute the change, from the gradients of all requests in one pass.

        Raises:
            WrongModelError: it was fitted to another model.
            RequestError: there is no request, two contradict each other, or a classifier has no
                such label.
            NotFiniteError: the loss or a gradient is NaN or infinite.
            TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        """
        requests = unique(requests)
        check_batch(requests)
        self.check(lm)
        progress("gradients", 0, 1)
        changes = self.change(lm, requests)
        progress("gradients", 1, 1)
        return WeightEdit.of(
            lm,
            changes,
            requests=requests,
            record=Record.of(
                lm,
                method=self.name,
                config=self.config,
                seed=self.config.seed,
                notes={"left out": [], "fit": self.fit.notes} | self.notes(lm),
            ),
        )


def last_blocks(lm: LanguageModel) -> tuple[int, ...]:
    """Where learnt editors edit unless told otherwise (Mitchell et al. 2022): the last three."""
    return tuple(range(max(0, lm.layers - BLOCKS), lm.layers))


def mlp_paths(lm: LanguageModel, layers: Sequence[int]) -> tuple[str, ...]:
    """Both MLP matrices of some blocks."""
    return tuple(p for layer in layers for p in (lm.mlp_in_path(layer), lm.mlp_out_path(layer)))


def shapes(lm: LanguageModel, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of some matrices."""
    found = {path: weight_out_in(lm.module(path)).shape for path in paths}
    return {path: (shape[0], shape[1]) for path, shape in found.items()}


def root_mean_square(lm: LanguageModel, path: str) -> float:
    """Of a matrix' entries: what relative numbers are measured in."""
    return float(weight_out_in(lm.module(path)).double().square().mean().sqrt())


def usual_change(lm: LanguageModel, path: str) -> float:
    """The root mean square entry of a change of rank one that is as large as its matrix is usually.

    That is, whose singular value is the root mean square of the matrix' own: a change of rank one
    with entries like the matrix' would be larger by the root of its smaller side.
    """
    return root_mean_square(lm, path) / math.sqrt(min(weight_out_in(lm.module(path)).shape))


def fit_learner(
    lm: LanguageModel,
    layers: Sequence[int],
    cases: TrainingCases,
    config: AConfig,
    begin: Callable[[tuple[str, ...]], ALearner],
    *,
    folder: Path | None,
    notes: Mapping[str, Any] | None = None,
    progress: Progress,
) -> tuple[AConfig, Fit, ALearner]:
    """Train a learner of the MLP matrices of some blocks.

    Args:
        lm: the model; it is left as it is.
        layers: the blocks.
        cases: what to learn from.
        config: the numbers.
        begin: makes the learner from the matrices' paths.
        folder: where checkpoints are kept.
        notes: what else the editor's file should tell.
        progress: called with (stage, done, total).

    Returns:
        The numbers with these blocks, the record of the fit, and the learner as it was best.

    Raises:
        FitError: there are no cases, none has neighbours, or the loss became NaN.
        NotFiniteError: a matrix holds NaN or infinity.
        TokenizationError: a case's text is too long, or has no token; before the first step.
        RequestError: a classifier has no such label; before the first step.
    """
    cases.check()
    if config.objective.kept and not any(case.neighbours for case in cases.train):
        raise FitError(
            "no case to learn from has neighbours, so the editor cannot learn what must stay. Give "
            "cases that have some, such as CounterFact's, or set objective.kept = 0."
        )
    paths = mlp_paths(lm, layers)
    lm.check_finite(paths)
    every = [*cases.train, *cases.validation]
    check_examples(lm, [e for case in every for e in [*wordings(case), *neighbours(case)]])
    config = replace(config, layers=tuple(layers))
    numbers = {k: v for k, v in config.to_dict().items() if k not in ("layers", "training", "seed")}
    fit = Fit.of(lm, paths)
    learner = begin(paths)
    trained = train(
        learner,
        cases,
        config.training,
        seed=config.seed,
        folder=folder,
        identity={"base": fit.base} | numbers,
        progress=progress,
    )
    told = {
        "cases": {"train": len(cases.train), "validation": len(cases.validation)},
        "training": trained,
        "shapes": shapes(lm, paths),
    }
    return config, fit.with_notes(told | dict(notes or {})), learner
