"""Methods that must learn first: fitted once to a model, they give a frozen editor with a file.

::

    cases = TrainingCases.split(read_cases("pocket"), seed=0)
    editor = Mend(MendConfig(), Background()).fit(lm, cases)      # a Fitted
    editor.save("mend.safetensors")
    editor = load_editor("mend.safetensors", lm)                  # errata.editors.fitted
    edit = editor.edit(lm, requests)
"""

from __future__ import annotations

import copy
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from errata.editors.background import Background
from errata.editors.config import EditorConfig
from errata.editors.editor import Editor
from errata.edits.archive import Contents, write
from errata.edits.edit import Edit, as_json
from errata.edits.weights import base_hash
from errata.errors import FitError, WrongModelError
from errata.lm.load import LanguageModel
from errata.progress import Progress, silent
from errata.requests import Case, Request

FITTED = "fitted"
"""The kind of a fitted editor's file."""


@dataclass(frozen=True)
class TrainingCases:
    """What an editor learns from, and what says when it has learnt enough.

    Of a case count its request (what the model says wrongly, and what it should say), its
    paraphrases (where the answer must come too) and its neighbours (whose answers must stay).
    """

    train: tuple[Case, ...]
    validation: tuple[Case, ...]

    @classmethod
    def split(cls, cases: Sequence[Case], *, seed: int = 0, share: float = 0.1) -> Self:
        """A share of the cases, drawn by the seed, for validation; the others to learn from.

        Cases about one fact (subject and relation) stay together, so that no editor is validated
        with a fact that it has learnt from in other words; unless there is only one fact.

        Raises:
            FitError: there are not two cases, one for each.
        """
        if len(cases) < 2:
            raise FitError(
                f"{len(cases)} case cannot be divided into some to learn from and some to validate "
                "with; give at least two, better some hundred."
            )
        drawn = list(cases)
        random.Random(f"split {seed}").shuffle(drawn)
        facts: dict[object, list[Case]] = {}
        for case in drawn:
            facts.setdefault(case.fact, []).append(case)
        groups = list(facts.values()) if len(facts) > 1 else [[case] for case in drawn]
        validation = groups.pop(0)
        while len(groups) > 1 and len(validation) < round(share * len(drawn)):
            validation += groups.pop(0)
        return cls(tuple(chain(*groups)), tuple(validation))

    def check(self) -> None:
        """Refuse to learn from nothing.

        Raises:
            FitError: there is no case to learn from, or none to validate with.
        """
        if not self.train or not self.validation:
            raise FitError("an editor needs cases to learn from and cases to validate with.")


@dataclass(frozen=True)
class Fit:
    """How an editor was fitted: all JSON, no clock, so that the same fit gives the same file."""

    model: str
    """Name of the model."""
    dtype: str
    """That model's dtype, such as "float32"."""
    base: Mapping[str, str]
    """`base_hash` of each weight that the editor changes: the model that it is for."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Steps, losses, numbers of cases, scores: whatever there is to say."""

    @classmethod
    def of(
        cls, lm: LanguageModel, paths: Sequence[str], notes: Mapping[str, Any] | None = None
    ) -> Self:
        """The record of a fit to `lm`, of an editor of these weights."""
        return cls(
            model=lm.name,
            dtype=str(lm.dtype).removeprefix("torch."),
            base={path: base_hash(lm, path) for path in paths},
            notes=as_json(notes or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that a file holds."""
        return {f.name: as_json(getattr(self, f.name)) for f in fields(self)}

    def with_notes(self, notes: Mapping[str, Any]) -> Self:
        """The same with more notes."""
        return type(self)(self.model, self.dtype, self.base, {**self.notes, **as_json(notes)})


class Fitted(Editor):
    """An editor that has learnt. Frozen: editing changes nothing of it."""

    def __init__(self, config: EditorConfig, fit: Fit) -> None:
        """Keep the numbers that it was fitted with, and how that went.

        Args:
            config: the method's numbers; its layers are those that are edited.
            fit: how it was fitted.
        """
        super().__init__(config, Background())
        self.fit = fit

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it has learnt, by name."""

    @abstractmethod
    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> Edit:
        """Compute the change (see `Editor.edit`).

        Raises:
            WrongModelError: it was fitted to another model.
        """

    def prepare(self, lm: LanguageModel, *, progress: Progress = silent) -> None:
        """Refuse another model than that which it was fitted to.

        Raises:
            WrongModelError: it is another model, or the same in another dtype.
        """
        self.check(lm)

    def check(self, lm: LanguageModel) -> None:
        """Refuse another model than that which it was fitted to; edits on the model are no matter.

        Raises:
            WrongModelError: it is another model, or the same in another dtype.
        """
        made_for = f"this {self.name} editor was fitted to {self.fit.model!r} in {self.fit.dtype}"
        for path, digest in self.fit.base.items():
            try:
                lm.module(path)
            except AttributeError as error:
                raise WrongModelError(
                    f"{made_for}; it does not fit {lm.name!r}, which has no {path}. Fit one to "
                    f"{lm.name!r}."
                ) from error
            if base_hash(lm, path) != digest:
                dtype = str(lm.dtype).removeprefix("torch.")
                raise WrongModelError(
                    f"{made_for}, and {path} of {lm.name!r} in {dtype} holds other weights; load "
                    "the model that it was fitted to, in the same dtype, or fit one to this model."
                )

    def contents(self) -> Contents:
        """What its file holds."""
        fields = {
            "method": self.name,
            "config": as_json(self.config.to_dict()),
            "fit": self.fit.to_dict(),
        }
        return Contents(FITTED, fields, self.tensors())

    def with_notes(self, notes: Mapping[str, Any]) -> Self:
        """The same editor with more to tell of its fit."""
        told = copy.copy(self)
        told.fit = self.fit.with_notes(notes)
        return told

    def save(self, path: Path | str) -> None:
        """Write the editor to one safetensors file, whole or not at all.

        Raises:
            StorageError: the file cannot be written.
        """
        write(path, self.contents())


class Trainable(Editor):
    """A method that must learn first: `fit` yields the editor."""

    @abstractmethod
    def fit(
        self,
        lm: LanguageModel,
        cases: TrainingCases,
        *,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> Fitted:
        """Learn to edit `lm`, which is left as it is.

        Args:
            lm: the model.
            cases: what to learn from.
            folder: where checkpoints are kept; a fit that was cut short there goes on.
            progress: called with (stage, done, total).

        Raises:
            FitError: there is nothing to learn from, the loss became NaN, or the folder holds
                another fit's checkpoint.
            ConfigError: the model and the method's numbers do not go together.
        """

    @abstractmethod
    def restored(self, fit: Fit, tensors: Mapping[str, Tensor]) -> Fitted:
        """The editor that a file holds; `self` has the numbers that it was fitted with.

        Raises:
            KeyError: the tensors are not those of such an editor.
        """

    def prepare(self, lm: LanguageModel, *, progress: Progress = silent) -> None:
        """There is no editing without a fit.

        Raises:
            FitError: always.
        """
        self._unfitted(lm)

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> NoReturn:
        """There is no editing without a fit.

        Raises:
            FitError: always.
        """
        self._unfitted(lm)

    def _unfitted(self, lm: LanguageModel) -> NoReturn:
        raise FitError(
            f"{self.name} must be fitted to {lm.name} before it can edit it: `errata fit "
            f"{self.name} -m {lm.name} -o {self.name}.safetensors`, then edit with `--editor "
            f"{self.name}.safetensors`."
        )


def frozen_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that nothing else changes, on the CPU, without gradient."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
