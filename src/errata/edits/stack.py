"""Stack: several edits in order, with the verbs of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.algebra.low_rank import LowRank
from errata.edits.archive import Contents
from errata.edits.edit import Edit, Record
from errata.edits.weights import WeightEdit, take_back_
from errata.errors import EditStateError
from errata.lm.load import LanguageModel
from errata.requests import Request


@dataclass(frozen=True, eq=False)
class Stack(Edit):
    """Edits, applied in order. A model lists them one by one, so each can be taken back alone."""

    edits: tuple[Edit, ...]
    """From the first to the last applied; stacks inside are laid flat."""
    record: Record

    def __init__(self, edits: Sequence[Edit], record: Record | None = None) -> None:
        flat = tuple(part for edit in edits for part in edit.parts)
        models = sorted({part.record.model for part in flat})
        object.__setattr__(self, "edits", flat)
        object.__setattr__(
            self, "record", record or Record(method="stack", model=", ".join(models))
        )

    @property
    def requests(self) -> tuple[Request, ...]:  # type: ignore[override]  # as read-only as a field
        """The requests of all edits, in order."""
        return tuple(request for edit in self.edits for request in edit.requests)

    @property
    def parts(self) -> tuple[Edit, ...]:
        """Its edits."""
        return self.edits

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules whose weights any of its edits changes."""
        return tuple(dict.fromkeys(path for edit in self.edits for path in edit.paths))

    @property
    def nbytes(self) -> int:
        """What the tensors of its edits take in memory."""
        return sum(edit.nbytes for edit in self.edits)

    def without(self, k: int) -> Stack:
        """The stack without its k-th edit, counting from 0; negative numbers count from the end.

        Raises:
            EditStateError: there is no k-th edit.
        """
        if not -len(self.edits) <= k < len(self.edits):
            raise EditStateError(
                f"there is no edit {k} in a stack of {len(self.edits)} (counting from 0)."
            )
        k %= len(self.edits)
        return Stack(self.edits[:k] + self.edits[k + 1 :])

    def apply_(self, lm: LanguageModel, *, force: bool = False) -> None:
        """Apply all edits in order; all or, on any error, none (see `Edit.apply_`)."""
        done: list[Edit] = []
        try:
            for edit in self.edits:
                edit.apply_(lm, force=force)
                done.append(edit)
        except BaseException:
            _take_back_(lm, done)
            raise

    def undo_(self, lm: LanguageModel) -> None:
        """Take all of its edits back.

        Raises:
            EditStateError: one of them is not on the model; then none is taken back.
        """
        for k, edit in enumerate(self.edits):
            if not edit.is_applied(lm):
                raise EditStateError(
                    f"edit {k} of the stack, {edit}, is not on {lm.name!r}, so the stack cannot be "
                    "taken back whole."
                )
        _take_back_(lm, self.edits)

    def is_applied(self, lm: LanguageModel) -> bool:
        """Whether all of its edits are on the model now."""
        return all(edit.is_applied(lm) for edit in self.edits)

    def contents(self, dtype: torch.dtype = torch.float32) -> Contents:
        """What a file of this stack holds: the contents of its edits, numbered."""
        parts = [edit.contents(dtype) for edit in self.edits]
        fields = {
            "record": self.record.to_dict(),
            "parts": [{"kind": part.kind, "fields": part.fields} for part in parts],
        }
        tensors = {
            f"{k}:{name}": t for k, part in enumerate(parts) for name, t in part.tensors.items()
        }
        return Contents("stack", fields, tensors)

    def __str__(self) -> str:
        return f"the stack of {len(self.edits)} edits"


def weight_changes(edit: Edit) -> dict[str, LowRank]:
    """All changes to weights that an edit or a stack makes, summed by path."""
    total: dict[str, LowRank] = {}
    for part in edit.parts:
        if isinstance(part, WeightEdit):
            for path, change in part.changes.items():
                total[path] = total[path] + change if path in total else change
    return total


def _take_back_(lm: LanguageModel, edits: Sequence[Edit]) -> None:
    take_back_(lm, [edit for edit in edits if isinstance(edit, WeightEdit)])
    for edit in reversed(edits):
        if not isinstance(edit, WeightEdit):
            edit.undo_(lm)
