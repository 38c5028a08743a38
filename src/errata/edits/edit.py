"""Edit: a frozen change to a model, with the verbs that every kind of change shares.

What is applied to a model is written on the model: `lm.applied` lists the edits now on it, in
order, and `lm.originals` keeps the weights as loaded of every matrix that they touch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Self

import torch

from errata.edits.archive import Contents, write
from errata.errors import EditFileError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.requests import UNLESS_DEFAULT, Request


@dataclass(frozen=True)
class Record:
    """How an edit was made and how it scored; everything in it is JSON."""

    method: str = ""
    """The editor's name."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The method's numbers."""
    model: str = ""
    """Name of the model that it was made for."""
    dtype: str = ""
    """That model's dtype, such as "float32"."""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """Libraries that it was made with."""
    scores: Mapping[str, Any] | None = None
    """What it scored, where it was measured."""
    created: str = ""
    """When, UTC, ISO 8601."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the method has to say: losses, norms, devices."""

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        *,
        method: str,
        config: object = None,
        seed: int | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Self:
        """The record of an edit that is made now, for `lm`.

        Args:
            lm: the model.
            method: the editor's name.
            config: its config, a dataclass or a mapping.
            seed: what everything random started from.
            notes: whatever else is worth keeping.
        """
        return cls(
            method=method,
            config=as_json(config or {}),
            model=lm.name,
            dtype=str(lm.dtype).removeprefix("torch."),
            seed=seed,
            versions={name: _version(name) for name in ("errata", "torch", "transformers")},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=as_json(notes or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        return {f.name: as_json(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a record from an edit file.

        Raises:
            EditFileError: it has a field that this errata does not know.
        """
        if unknown := values.keys() - {f.name for f in fields(cls)}:
            raise EditFileError(
                f"the edit's record has the unknown fields {sorted(unknown)}; a newer errata "
                "wrote it."
            )
        return cls(**values)


class Edit(ABC):
    """A change to a model: apply, take back, save. Immutable; the model keeps the books."""

    requests: tuple[Request, ...]
    """What the model should say from now on."""
    record: Record
    """How the edit was made and how it scored."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Edit, ...]:
        """The edits that `lm.applied` will list, in order: itself, or a stack's."""

    @property
    @abstractmethod
    def paths(self) -> tuple[str, ...]:
        """Modules whose weights it changes."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What its tensors take in memory."""

    @abstractmethod
    def apply_(self, lm: LanguageModel, *, force: bool = False) -> None:
        """Change the model until `undo_`; all of it or, on any error, nothing.

        Args:
            lm: the model.
            force: apply even to weights that the edit was not made for, with a logged warning.

        Raises:
            EditStateError: the edit is on the model already.
            NotFiniteError: the edit, the weights or their sum hold NaN or infinity.
            WrongModelError: the edit was made for another model.
        """

    @abstractmethod
    def undo_(self, lm: LanguageModel) -> None:
        """Take the edit back, also from under others: as if it had never been applied.

        Raises:
            EditStateError: the edit is not on the model.
        """

    @abstractmethod
    def is_applied(self, lm: LanguageModel) -> bool:
        """Whether the edit (of a stack: all of it) is on the model now."""

    @abstractmethod
    def contents(self, dtype: torch.dtype = torch.float32) -> Contents:
        """What a file of this edit holds, tensors in `dtype`."""

    @contextmanager
    def applied(self, lm: LanguageModel, *, force: bool = False) -> Iterator[None]:
        """The model is edited inside the block, and bit for bit itself after it.

        Weights are copied back, never subtracted from: in bfloat16 (W + D) - D is not W.
        """
        below = list(lm.applied)
        touched = {
            path: weight_out_in(lm.module(path)).clone()
            for path in self.paths
            if path in lm.originals
        }
        self.apply_(lm, force=force)
        try:
            yield
        finally:
            if self.is_applied(lm):
                self.undo_(lm)
            else:  # it, or some of a stack, was taken back inside the block
                for part in reversed(self.parts):
                    if part.is_applied(lm):
                        part.undo_(lm)
            if len(lm.applied) == len(below) and all(map(_is, lm.applied, below)):
                for path, weight in touched.items():
                    weight_out_in(lm.module(path)).copy_(weight)

    def save(self, path: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the edit to one safetensors file, whole or not at all.

        Args:
            path: the file, by custom `*.safetensors`.
            dtype: of the factors; float32 gives a model of up to float32 the very same bits back.

        Raises:
            NotFiniteError: the edit holds NaN or infinity, perhaps only in `dtype`.
            StorageError: the file cannot be written.
        """
        for part in self.parts:
            part.save_beside(Path(path).parent)
        write(path, self.contents(dtype))

    def save_beside(self, folder: Path) -> None:  # noqa: B027  # most need nothing
        """Write into a folder what the edit needs there beside its own file.

        Raises:
            StorageError: it cannot be written.
        """

    def with_scores(self, scores: Mapping[str, Any]) -> Self:
        """The same edit with what it scored in its record."""
        record = replace(self.record, scores=as_json(scores))
        return replace(self, record=record)  # type: ignore[type-var]  # every kind is a dataclass

    def with_notes(self, notes: Mapping[str, Any]) -> Self:
        """The same edit with more notes in its record."""
        record = replace(self.record, notes={**self.record.notes, **as_json(notes)})
        return replace(self, record=record)  # type: ignore[type-var]  # every kind is a dataclass


def as_json(value: Any) -> Any:
    """The value in JSON's types: NaN and infinity become null, what JSON lacks becomes text.

    Fields marked `UNLESS_DEFAULT` are left out where they hold their default.
    """
    if is_dataclass(value) and not isinstance(value, type):
        told = [(f, getattr(value, f.name)) for f in fields(value)]
        value = {f.name: x for f, x in told if f.metadata != UNLESS_DEFAULT or x != f.default}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, numpy's numbers and arrays
        return as_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def requests_as_json(requests: tuple[Request, ...]) -> list[dict[str, str]]:
    """The requests as an edit file holds them."""
    return [request.to_dict() for request in requests]


def _is(a: object, b: object) -> bool:
    return a is b


def _version(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "unknown"
