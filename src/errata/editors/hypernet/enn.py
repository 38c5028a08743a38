"""ENN: the model itself is trained to be easily edited by gradient descent (Sinitsin et al. 2020).

"Editable Neural Networks", arXiv:2004.00345, with the objective of the code that came with MEND. To
edit is to take a few steps, by default one, of plain gradient descent on the request. Training goes
through these steps (second-order) and moves the edited weights W and the step sizes a so that

    W'  = W + D                                             the retrained model
    W'' = W' - a * dNLL(new answer | request) / dW'         one request's edited model
    loss = c_edit * NLL(new answer | other wording; W'')
         + c_kept * KL(W' || W''  on a neighbour's answer)
         + c_base * KL(W  || W'   on a neighbour's answer)

is small. D, a matrix for each edited weight, and a are what is learnt; the model is left as it is.
An edit of a model therefore holds D and the steps, and what it loses is measured against W. On a
model that has D on it already, an edit of the same editor holds the steps alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from errata.algebra.low_rank import LowRank
from errata.editors.config import Config
from errata.editors.hypernet.applied import low_rank_applied
from errata.editors.hypernet.gradients import (
    Decomposed,
    joined,
    one_pass,
    stacked,
    typical,
)
from errata.editors.hypernet.learnt import (
    LearntConfig,
    LearntEditor,
    fit_learner,
    last_blocks,
    root_mean_square,
    shapes,
    usual_change,
)
from errata.editors.hypernet.objective import Questions, divergence, outer_loss
from errata.editors.trainable import Fit, Trainable, TrainingCases, frozen_copy
from errata.editors.training import Learner
from errata.editors.wordings import example
from errata.lm.forward import frozen
from errata.lm.hooks import replaced_forward
from errata.lm.load import LanguageModel
from errata.lm.loss import Answers, Example, answer_logits, example_batches
from errata.lm.weights import weight_hash, weight_out_in
from errata.progress import Progress, silent
from errata.requests import Case, Request


@dataclass(frozen=True)
class EditableConfig(Config):
    """Numbers of what is learnt, and of the steps that an edit takes."""

    inner: int = 1
    """How many steps of gradient descent an edit takes."""
    units: Literal["relative", "absolute"] = "relative"
    """Whether `step` is how large the first step is for a typical gradient, in singular values that
    the weight usually has, and `learning_rate` how far Adam moves a weight's entry, in their root
    mean square; or both are as they are (MEND's code)."""
    step: float = 0.2
    """How large the first step is. MEND's code: 1e-2, absolute."""
    learning_rate: float = 0.001
    """Of the weights. MEND's code: 1e-5, absolute."""
    step_learning_rate: float = 0.03
    """Of the steps; relative to `step` if units are relative. MEND's code: 1e-3, absolute."""
    base: float = 1.0
    """c_base, of what the retrained model says otherwise than the original (MEND's code)."""

    def __post_init__(self) -> None:
        """Refuse what makes no step."""
        super().__post_init__()
        self._positive("inner")
        self._not_negative("step", "learning_rate", "step_learning_rate", "base")


@dataclass(frozen=True)
class EnnConfig(LearntConfig):
    """ENN's numbers."""

    editable: EditableConfig = field(default_factory=EditableConfig)


class Editable(nn.Module):
    """The change D of each edited weight, and its step size."""

    units: Tensor

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: EditableConfig) -> None:
        """Nothing learnt: D is 0, and so are the units until `begin_` or a file sets them.

        Args:
            shapes: (d_out, d_in) of each weight, by module path.
            config: the numbers.
        """
        super().__init__()
        self.paths = tuple(shapes)
        self.config = config
        self.differences = nn.ParameterList(torch.zeros(shape) for shape in shapes.values())
        self.steps = nn.Parameter(torch.ones(len(shapes)))
        self.register_buffer("units", torch.zeros(len(shapes)))
        self.scales = [1.0] * len(shapes)

    def begin_(self, lm: LanguageModel, examples: Sequence[Example]) -> None:
        """Measure steps and learning rates by the model and its gradients."""
        if self.config.units == "relative":
            usual = typical(lm, examples, self.paths)
            self.scales = [root_mean_square(lm, path) for path in self.paths]
            for number, path in enumerate(self.paths):
                unit = usual_change(lm, path) / usual[path] if usual[path] else 0.0
                self.units[number] = self.config.step * unit
        else:
            self.units.fill_(self.config.step)
        self.to(lm.device)

    @contextmanager
    def retrained(self, lm: LanguageModel) -> Iterator[None]:
        """While open, the model runs on W + D, with gradient for D; no weight is touched."""

        def runs_on(module: nn.Module, difference: Tensor) -> Callable[[Tensor], Tensor]:
            own = weight_out_in(module)
            weight = (own.to(difference) + difference).to(own.dtype)
            return lambda states: functional.linear(states, weight, module.bias)  # type: ignore[arg-type]

        modules = [lm.module(path) for path in self.paths]
        with replaced_forward(
            {m: runs_on(m, d) for m, d in zip(modules, self.differences, strict=True)}
        ):
            yield

    def descended(
        self, lm: LanguageModel, examples: Sequence[Example], *, differentiable: bool = False
    ) -> dict[str, Decomposed]:
        """What the steps change for each example alone, in rows owned by the examples.

        Args:
            lm: the model, retrained.
            examples: the edits; the owners.
            differentiable: whether gradients pass through the steps.
        """
        parts = []
        for group in example_batches(lm, examples, 4096):
            numbers = torch.tensor(sorted(group))
            some = [examples[number] for number in numbers]
            found = self._descended(lm, some, differentiable)
            parts.append(
                {
                    p: Decomposed(r.inputs, r.deltas, numbers.to(r.owner.device)[r.owner])
                    for p, r in found.items()
                }
            )
        return {path: joined([part[path] for part in parts]) for path in self.paths}

    def _descended(
        self, lm: LanguageModel, examples: Sequence[Example], differentiable: bool
    ) -> dict[str, Decomposed]:
        """The same in one pass a step."""
        so_far: dict[str, Decomposed] = {}
        each = torch.arange(len(examples))
        for _ in range(self.config.inner):
            applied = stacked(so_far, len(examples))
            # The usual kernels of attention have no second derivatives.
            kernel = sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext()
            with kernel, low_rank_applied(lm, applied, each):
                rows = one_pass(lm, examples, self.paths, differentiable=differentiable)
            for number, path in enumerate(self.paths):
                step = -self.units[number] * self.steps[number]
                taken = Decomposed(rows[path].inputs, step * rows[path].deltas, rows[path].owner)
                so_far[path] = joined([so_far[path], taken]) if path in so_far else taken
        return so_far

    def rates(self) -> dict[str, float]:
        """Adam's learning rate for each parameter."""
        config = self.config
        rates = {
            f"differences.{number}": config.learning_rate * scale
            for number, scale in enumerate(self.scales)
        }
        # Steps are kept as multiples of the first one, which absolute rates know nothing of.
        relative = config.units == "relative" or not config.step
        return rates | {"steps": config.step_learning_rate / (1.0 if relative else config.step)}


class EnnLearner(Learner):
    """The retraining as the outer loop trains it."""

    def __init__(self, lm: LanguageModel, editable: Editable, config: EnnConfig) -> None:
        """Train `editable` for `lm`, which stays as it is.

        Args:
            lm: the model.
            editable: what is trained.
            config: what counts how much.
        """
        super().__init__()
        self.lm = lm
        self.editable = editable
        self.config = config

    def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        """The outer loss: each case edits the retrained model and is asked about the edited one."""
        lm, questions = self.lm, Questions.of(cases, draw, self.config.objective)
        original = self._answers(questions, original=True)
        with self.editable.retrained(lm):
            changes = self.editable.descended(lm, questions.edits, differentiable=self.training)
            now = self._answers(questions)
            found = outer_loss(
                lm,
                questions,
                stacked(changes, len(cases)),
                self.config.objective,
                before=None if now is None else replace(now, logits=now.logits.detach()),
            )
        base = found["loss"].new_zeros(())
        if original is not None and now is not None:
            base = original.averaged(divergence(original, now)).mean()
        found["loss"] = found["loss"] + self.config.editable.base * base
        return found | {"base": base}

    def _answers(self, questions: Questions, *, original: bool = False) -> Answers | None:
        """What is said of neighbours; of the original model without gradient."""
        if not questions.kept:
            return None
        with torch.no_grad() if original else nullcontext(), frozen(self.lm):
            return answer_logits(self.lm, questions.kept)

    def rates(self) -> Mapping[str, float]:
        """Adam's learning rate for each parameter."""
        return {f"editable.{name}": rate for name, rate in self.editable.rates().items()}


class FittedEnn(LearntEditor):
    """ENN, fitted. Of several requests the steps add up, each as it would be alone."""

    name = "enn"
    config: EnnConfig

    def __init__(self, config: EnnConfig, fit: Fit, editable: Editable) -> None:
        """Keep a retraining.

        Args:
            config: its numbers, with the blocks that it edits.
            fit: how it was fitted.
            editable: what was learnt.
        """
        super().__init__(config, fit)
        self.editable = editable.eval().requires_grad_(False)
        hashes = [weight_hash(difference) for difference in editable.differences]
        self.retraining = hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """The changes of the weights and the step sizes."""
        return frozen_copy(self.editable.state_dict())

    def is_retrained(self, lm: LanguageModel) -> bool:
        """Whether an edit on the model holds this editor's retraining."""
        return any(edit.record.notes.get("retraining") == self.retraining for edit in lm.applied)

    @torch.no_grad()
    def change(self, lm: LanguageModel, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The change of each matrix that carries out all requests, the retraining included."""
        editable, examples = self.editable.to(lm.device), [example(r) for r in requests]
        if self.is_retrained(lm):
            rows = editable.descended(lm, examples)
            return {path: change.low_rank() for path, change in rows.items()}
        with editable.retrained(lm):
            rows = editable.descended(lm, examples)
        return {
            path: LowRank.exact(difference + rows[path].low_rank().dense())
            for path, difference in zip(editable.paths, editable.differences, strict=True)
        }

    def notes(self, lm: LanguageModel) -> dict[str, Any]:
        """Which retraining the edit holds, or builds upon."""
        return {"builds upon" if self.is_retrained(lm) else "retraining": self.retraining}


class Enn(Trainable):
    """ENN, to be fitted."""

    name = "enn"
    config: EnnConfig

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The blocks to retrain: those that are named, or the last three.

        Raises:
            ConfigError: a layer is beyond the model's depth.
        """
        return super().layers(lm) if self.config.layers else last_blocks(lm)

    def fit(
        self,
        lm: LanguageModel,
        cases: TrainingCases,
        *,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> FittedEnn:
        """Train the weights and steps (see `Trainable.fit`)."""

        def begin(paths: tuple[str, ...]) -> EnnLearner:
            editable = Editable(shapes(lm, paths), self.config.editable)
            editable.begin_(lm, [example(case.request) for case in cases.train])
            return EnnLearner(lm, editable, self.config)

        config, fit, learner = fit_learner(
            lm, self.layers(lm), cases, self.config, begin, folder=folder, progress=progress
        )
        return FittedEnn(config, fit, learner.editable)

    def restored(self, fit: Fit, tensors: Mapping[str, Tensor]) -> FittedEnn:
        """The editor that a file holds."""
        sizes = {path: (shape[0], shape[1]) for path, shape in fit.notes["shapes"].items()}
        editable = Editable(sizes, self.config.editable)
        editable.load_state_dict(dict(tensors))
        return FittedEnn(self.config, fit, editable)
