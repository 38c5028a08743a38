"""WeightEdit: low-rank changes to weight matrices, applied and taken back exactly.

A weight with edits on it is always `as loaded + first change + second change + ...`, each sum
computed in float32 or wider and rounded once to the weight's dtype. Taking an edit back starts
from the copy as loaded and adds the others again, so that nothing of it remains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from errata.algebra.low_rank import LowRank
from errata.algebra.precision import is_finite
from errata.edits.archive import Contents
from errata.edits.edit import Edit, Record, requests_as_json
from errata.errors import EditStateError, NotFiniteError, WrongModelError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_hash, weight_out_in
from errata.requests import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class WeightEdit(Edit):
    """Low-rank changes to some of a model's matrices; make one with `of`."""

    changes: Mapping[str, LowRank]
    """What is added to which module's weight, seen as (d_out, d_in)."""
    base: Mapping[str, str]
    """`base_hash` of each of these weights: the model that the edit is for."""
    requests: tuple[Request, ...] = ()
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        """Hold tuples and dictionaries of its own."""
        if self.changes.keys() != self.base.keys():
            raise ValueError("every changed weight needs its base hash, and no other one.")
        object.__setattr__(self, "changes", dict(self.changes))
        object.__setattr__(self, "base", dict(self.base))
        object.__setattr__(self, "requests", tuple(self.requests))

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        changes: Mapping[str, LowRank],
        *,
        requests: Sequence[Request],
        record: Record,
    ) -> Self:
        """The edit that makes these changes to `lm`'s weights as they were loaded."""
        base = {path: base_hash(lm, path) for path in changes}
        return cls(changes, base, tuple(requests), record)

    @property
    def parts(self) -> tuple[Edit, ...]:
        """Itself."""
        return (self,)

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules whose weights it changes."""
        return tuple(self.changes)

    @property
    def nbytes(self) -> int:
        """What the factors take in memory."""
        return sum(change.nbytes for change in self.changes.values())

    def apply_(self, lm: LanguageModel, *, force: bool = False) -> None:
        """Change the weights until `undo_`; all or, on any error, none (see `Edit.apply_`)."""
        if self.is_applied(lm):
            raise EditStateError(
                f"{self} is on {lm.name!r} already; take it back first, or leave it."
            )
        self.check(lm, force=force)
        try:
            for path, change in self.changes.items():
                weight = weight_out_in(lm.module(path))
                if path not in lm.originals:
                    lm.originals[path] = _copy_with_hash(weight, self.base[path], known=not force)
                weight.copy_(_added(weight, change, path))
        except BaseException:
            _rebuild(lm, self.paths)
            raise
        lm.applied.append(self)

    def undo_(self, lm: LanguageModel) -> None:
        """Take the edit back, also from under others (see `Edit.undo_`)."""
        take_back_(lm, [self])

    def is_applied(self, lm: LanguageModel) -> bool:
        """Whether this edit, or an equal one from a file, is on the model now."""
        return any(self.equals(other) for other in lm.applied)

    def check(self, lm: LanguageModel, *, force: bool = False) -> None:
        """Refuse a model that the edit was not made for; changes nothing.

        Raises:
            NotFiniteError: the edit holds NaN or infinity.
            WrongModelError: a matrix is missing, of another shape or (without `force`) has other
                numbers than those that the edit was made for.
        """
        made_for = whose(self)
        for path, change in self.changes.items():
            shape = _shape(lm, path)
            if shape != change.shape:
                has = f"it is {shape}, not {change.shape}" if shape else "there is no such matrix"
                raise WrongModelError(f"{made_for}; it does not fit {lm.name!r}: at {path}, {has}.")
            if not change.is_finite():
                raise NotFiniteError(f"{self} holds NaN or infinity for {path}; make it anew.")
        refuse_other_weights(self, self.base, lm, force=force)

    def equals(self, other: object) -> bool:
        """Whether the other is this edit: the same, or equal in all but scores (to float32)."""
        if self is other:
            return True
        return (
            isinstance(other, WeightEdit)
            and self.requests == other.requests
            and self.base == other.base
            and all(_equal(change, other.changes[path]) for path, change in self.changes.items())
        )

    def contents(self, dtype: torch.dtype = torch.float32) -> Contents:
        """What a file of this edit holds, factors in `dtype`."""
        fields = {
            "base": self.base,
            "requests": requests_as_json(self.requests),
            "record": self.record.to_dict(),
        }
        tensors = {}
        for path, change in self.changes.items():
            tensors[f"{path}.left"] = change.left.to(dtype)
            tensors[f"{path}.right"] = change.right.to(dtype)
        return Contents("weight", fields, tensors)

    @classmethod
    def from_contents(cls, contents: Contents) -> Self:
        """The edit that a file of kind "weight" holds."""
        fields, tensors = contents.fields, contents.tensors
        return cls(
            {
                path: LowRank(tensors[f"{path}.left"].clone(), tensors[f"{path}.right"].clone())
                for path in fields["base"]
            },
            fields["base"],
            tuple(Request.from_dict(request) for request in fields["requests"]),
            Record.from_dict(fields["record"]),
        )

    def __str__(self) -> str:
        count = len(self.requests)
        about = f" ({self.requests[0].subject}{', ...' if count > 1 else ''})" if count else ""
        method = f"{self.record.method} edit" if self.record.method else "edit"
        return f"the {method} of {count} fact{'' if count == 1 else 's'}{about}"


def base_hash(lm: LanguageModel, path: str) -> str:
    """Hash of a weight, seen as (d_out, d_in), as it was loaded: under all edits on it."""
    kept = lm.originals.get(path)
    if kept is None:
        return weight_hash(weight_out_in(lm.module(path)))
    if not hasattr(kept, _HASH):  # our own copy, which never changes: hashed once
        setattr(kept, _HASH, weight_hash(kept))
    return str(getattr(kept, _HASH))


def refuse_other_weights(
    edit: Edit, base: Mapping[str, str], lm: LanguageModel, *, force: bool
) -> None:
    """Refuse an edit on a model whose weights have other hashes than those it was made for.

    With `force` it is a logged warning.

    Raises:
        WrongModelError: a weight holds other numbers.
    """
    for path, digest in base.items():
        if base_hash(lm, path) == digest:
            continue
        dtype = str(weight_out_in(lm.module(path)).dtype).removeprefix("torch.")
        sentence = f"{whose(edit)}, and {path} of {lm.name!r} in {dtype} holds other weights"
        if not force:
            raise WrongModelError(
                f"{sentence}; load the model that it was made for, in the same dtype, or force it."
            )
        logger.warning("%s; applied all the same, as forced.", sentence)


def whose(edit: Edit) -> str:
    """How a refusal begins: which edit it is, and the model that it was made for."""
    dtype = f" in {edit.record.dtype}" if edit.record.dtype else ""
    return f"{edit} was made for {edit.record.model!r}{dtype}"


def take_back_(lm: LanguageModel, edits: Sequence[WeightEdit]) -> None:
    """Take several edits back at once, so that each weight is rebuilt once.

    Raises:
        EditStateError: one of them is not on the model; then none is taken back.
    """
    remaining = list(lm.applied)
    for edit in edits:
        same = [i for i, other in enumerate(remaining) if other is edit]
        same = same or [i for i, other in enumerate(remaining) if edit.equals(other)]
        if not same:
            raise EditStateError(f"{edit} is not on {lm.name!r}, so it cannot be taken back.")
        del remaining[same[0]]
    lm.applied[:] = remaining
    _rebuild(lm, {path: None for edit in edits for path in edit.paths})


def _rebuild(lm: LanguageModel, paths: Iterable[str]) -> None:
    """Weights as loaded and what is still applied, in order; copies without use are freed."""
    for path in paths:
        if path not in lm.originals:
            continue
        value = lm.originals[path]
        edits = [e for e in lm.applied if isinstance(e, WeightEdit) and path in e.changes]
        for edit in edits:
            value = _added(value, edit.changes[path], path)
        weight_out_in(lm.module(path)).copy_(value)
        if not edits:
            del lm.originals[path]


def _added(weight: Tensor, change: LowRank, path: str) -> Tensor:
    """The weight with the change, summed in float32 or wider and rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = change.to(device=weight.device, dtype=wide)
    total = torch.addmm(weight.to(wide), change.left, change.right).to(weight.dtype)
    if not is_finite(total):
        if not is_finite(weight):
            raise NotFiniteError(f"the model's weight {path} holds NaN or infinity; load it again.")
        raise NotFiniteError(f"{path} with the edit overflows {weight.dtype}; nothing was changed.")
    return total


def _copy_with_hash(weight: Tensor, digest: str, *, known: bool) -> Tensor:
    copy = weight.clone()
    if known:  # `check` has just compared it
        setattr(copy, _HASH, digest)
    return copy


def _shape(lm: LanguageModel, path: str) -> tuple[int, ...]:
    """The shape of a weight as (d_out, d_in); () where there is none."""
    try:
        module: nn.Module = lm.module(path)
    except AttributeError:
        return ()
    if not isinstance(getattr(module, "weight", None), Tensor):
        return ()
    lm.check_editable([path])
    return tuple(weight_out_in(module).shape)


def _equal(a: LowRank, b: LowRank) -> bool:
    return a.shape == b.shape and all(
        torch.equal(x.cpu().float(), y.cpu().float())
        for x, y in ((a.left, b.left), (a.right, b.right))
    )


_HASH = "_errata_hash"
