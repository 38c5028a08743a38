"""The outer loop under every learnt editor: cases in, parameters that edit better out.

What is read at a step is a function of the seed and the step alone, so that a run which was killed
goes on from its last checkpoint as if nothing had happened: on a CPU, with the same number of
threads, bit for bit. A checkpoint is one file, there whole or not at all: parameters and buffers,
Adam's state, the best so far, and all validations.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from errata.editors.config import Config
from errata.editors.trainable import TrainingCases, frozen_copy
from errata.edits.archive import Contents, read, write
from errata.edits.edit import as_json
from errata.errors import FitError, NotFiniteError, StorageError
from errata.progress import Progress, silent
from errata.requests import Case

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
_KIND = "fit-checkpoint"


@dataclass(frozen=True)
class TrainingConfig(Config):
    """Numbers of the outer loop."""

    steps: int = 2000
    """At most so many steps of Adam."""
    batch: int = 10
    """Edits in a step (SaLEM's batch; MEND's code sums up 10 steps of one edit)."""
    at_once: int = 10
    """Edits in one pass; a larger batch takes several. Less needs less memory."""
    clip: float = 100.0
    """Largest norm of the gradient (MEND's code)."""
    validate_every: int = 100
    """Steps between validations, each followed by a checkpoint."""
    validation: int = 100
    """Cases that are validated with, at most: the first ones."""
    patience: int = 600
    """Stop after so many steps in which the validation loss has reached no new low."""

    def __post_init__(self) -> None:
        """Refuse numbers that would do nothing."""
        super().__post_init__()
        self._positive("steps", "batch", "at_once", "validate_every", "validation", "patience")
        self._require(self.clip > 0, f"clip must be positive, got {self.clip}.")


class Learner(nn.Module, ABC):
    """What is trained: parameters, buffers (kept in checkpoints too), and a loss.

    In training mode `loss` may change buffers, in evaluation mode it may not.
    """

    @abstractmethod
    def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        """The mean over some cases of `loss`, which is minimised, and of whatever else to tell.

        Args:
            cases: what to learn from.
            draw: everything random comes from it.
        """

    @abstractmethod
    def rates(self) -> Mapping[str, float]:
        """Adam's learning rate for each parameter, by name."""

    def validated(self, means: Mapping[str, float]) -> None:  # noqa: B027  # most need not know
        """Called with what a validation found; may change buffers."""


@dataclass(frozen=True)
class Trained:
    """How a training went; the learner holds the parameters of its best validation."""

    steps: int
    """How many were made, those before an interruption included."""
    best: int
    """After how many of them validation was best."""
    validations: tuple[Mapping[str, float], ...]
    """In order: `step`, `loss`, and all that the learner told."""
    stopped: str
    """Why it ended, in words."""


def train(
    learner: Learner,
    cases: TrainingCases,
    config: TrainingConfig,
    *,
    seed: int = 0,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Trained:
    """Minimise the learner's loss until its steps are made or validation no longer gets better.

    Args:
        learner: what is trained, in place; afterwards it is in evaluation mode.
        cases: what to learn from, and what to validate with.
        config: the numbers.
        seed: of the order of cases and of all that the learner draws.
        folder: where the checkpoint is kept. One that is there already is gone on from.
        identity: what the run depends on beside cases, numbers and seed: a checkpoint of another
            run is refused.
        progress: called with steps done.

    Raises:
        FitError: a loss or gradient became NaN or infinite, or the folder's checkpoint is of
            another run.
        StorageError: the checkpoint cannot be written.
        EditFileError: the checkpoint was altered.
    """
    cases.check()
    run = _Run(learner, cases, config, seed, folder, _digest(cases, config, seed, identity or {}))
    if run.file is not None and run.file.exists():
        run.resume()
    progress("steps", run.step, config.steps)
    while not (why := run.why_to_stop()):
        run.advance()
        if run.step % config.validate_every == 0 or run.step == config.steps:
            run.validate()
        progress("steps", run.step, config.steps)
    progress("steps", config.steps, config.steps)
    learner.load_state_dict(run.best)
    learner.eval()
    return Trained(run.step, run.best_step, tuple(run.validations), why)


def batch_at(cases: Sequence[Case], step: int, size: int, seed: int) -> list[Case]:
    """The cases of a step (from 0): each once an epoch, in an order of the epoch's own."""
    chosen = []
    for number in range(step * size, (step + 1) * size):
        epoch, place = divmod(number, len(cases))
        chosen.append(cases[_order(len(cases), seed, epoch)[place]])
    return chosen


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"epoch {seed} {epoch}").sample(range(count), count))


@dataclass
class _Run:
    """A training as far as it has come."""

    learner: Learner
    cases: TrainingCases
    config: TrainingConfig
    seed: int
    folder: Path | None
    digest: str
    step: int = 0
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    validations: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rates = self.learner.rates()
        self.names = [name for name, _ in self.learner.named_parameters()]
        self.adam = torch.optim.Adam(
            [{"params": [p], "lr": rates[name]} for name, p in self.learner.named_parameters()],
            fused=True,
        )

    @property
    def file(self) -> Path | None:
        return None if self.folder is None else self.folder / CHECKPOINT

    def advance(self) -> None:
        """One step of Adam."""
        batch = batch_at(self.cases.train, self.step, self.config.batch, self.seed)
        draw = random.Random(f"step {self.seed} {self.step}")
        self.learner.train()
        self.adam.zero_grad(set_to_none=True)
        for part in _parts(batch, self.config.at_once):
            loss = self._loss(part, draw)["loss"]
            if not loss.isfinite():
                self._fail(f"the loss became {float(loss.detach())}", part)
            torch.autograd.backward(loss * (len(part) / len(batch)))
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.clip)
        if not norm.isfinite():
            self._fail(f"the gradient's norm became {float(norm)}", batch)
        self.adam.step()
        self.step += 1

    def _loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        """The learner's loss; an edited model that overflows stops the run like any other NaN."""
        try:
            return self.learner.loss(cases, draw)
        except NotFiniteError as error:
            self._fail(str(error), cases)

    def validate(self) -> None:
        """Measure the validation cases, remember the best, write the checkpoint."""
        cases = self.cases.validation[: self.config.validation]
        draw = random.Random(f"validation {self.seed}")  # each time the same questions
        self.learner.eval()
        sums: dict[str, float] = {}
        for part in _parts(cases, self.config.at_once):
            with torch.no_grad():
                found = self._loss(part, draw)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(part)
        means = {name: total / len(cases) for name, total in sums.items()}
        if not all(map(math.isfinite, means.values())):
            self._fail("the validation loss became NaN or infinite", cases)
        if not self.validations or means["loss"] < self.lowest:
            self.best_step, self.best = self.step, frozen_copy(self.learner.state_dict())
        self.validations.append({"step": self.step, **means})
        self.learner.validated(means)
        logger.info("step %d: %s", self.step, ", ".join(f"{n} {v:.4g}" for n, v in means.items()))
        if self.file is not None:
            self.save(self.file)

    @property
    def lowest(self) -> float:
        """The best validation loss so far."""
        return min(found["loss"] for found in self.validations)

    def why_to_stop(self) -> str:
        """Why there is nothing more to do; empty if there is."""
        if self.step - self.best_step >= self.config.patience:
            return (
                f"stopped early: validation was best at step {self.best_step} (loss "
                f"{self.lowest:.4g}) and not better in the {self.config.patience} steps after it"
            )
        if self.step >= self.config.steps:
            return f"all {self.step} steps are made; validation was best at step {self.best_step}"
        return ""

    def save(self, file: Path) -> None:
        """Write the checkpoint."""
        tensors = {f"now.{name}": tensor for name, tensor in self.learner.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, state in self.adam.state_dict()["state"].items():
            for name, tensor in state.items():
                tensors[f"adam.{self.names[number]}.{name}"] = tensor
        fields = {
            "digest": self.digest,
            "step": self.step,
            "best": self.best_step,
            "validations": self.validations,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, Contents(_KIND, fields, tensors))
        except NotFiniteError as error:
            self._fail(f"the parameters hold NaN or infinity ({error})", ())
        except OSError as error:
            raise StorageError(
                f"cannot make the folder {file.parent}: {error.strerror or error}. Name another "
                "place."
            ) from error

    def resume(self) -> None:
        """Go on where the checkpoint ends."""
        assert self.file is not None
        contents = read(self.file)
        if contents.kind != _KIND or contents.fields["digest"] != self.digest:
            raise FitError(
                f"{self.file} is the checkpoint of another fit: of another model, other cases or "
                "other settings. Name another place, or delete it to begin anew."
            )
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "adam": {}}
        for name, tensor in contents.tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        self.learner.load_state_dict(parts["now"])
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(self.names)}
        for name, tensor in parts["adam"].items():
            parameter, _, what = name.rpartition(".")
            state.setdefault(numbers[parameter], {})[what] = tensor
        self.adam.load_state_dict(self.adam.state_dict() | {"state": state})
        self.best, self.step = parts["best"], contents.fields["step"]
        self.best_step = contents.fields["best"]
        self.validations = list(contents.fields["validations"])

    def _fail(self, what: str, cases: Sequence[Case]) -> NoReturn:
        named = ", ".join(repr(case.request.text) for case in cases[:3])
        where = f" on {named}{', ...' if len(cases) > 3 else ''}" if cases else ""
        kept = "no checkpoint was kept"
        if self.file is not None and self.file.exists():
            kept = (
                f"the last good checkpoint, of step {self.validations[-1]['step']}, is {self.file}"
            )
        raise FitError(
            f"step {self.step}: {what}{where}; {kept}. Fit again with lower learning rates, "
            "or in float32."
        )


def _parts(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    return [cases[i : i + size] for i in range(0, len(cases), size)]


def _digest(
    cases: TrainingCases, config: TrainingConfig, seed: int, identity: Mapping[str, Any]
) -> str:
    """What a checkpoint must have in common with a run that goes on from it.

    That is everything but the number of steps and the patience: a run may be made longer.
    """
    numbers = {n: v for n, v in config.to_dict().items() if n not in ("steps", "patience")}
    told = [asdict(cases), numbers, seed, as_json(identity)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
