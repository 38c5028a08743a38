"""MemoryEdit: a change beside the weights, which never change, applied and taken back exactly.

What edits of one kind, with the same settings, hold at one place of a model is merged into one
memory while they are applied (`lm.memories`), so that a stream is a stack of small edits and a pass
asks all of them at once. The merged memory is computed anew, from the entries of the edits that are
on the model in their order, when a pass comes by: taking any of them back leaves what would have
been without it. Where two edits write the same prompt, the later one's entry alone is merged.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from errata.algebra.precision import is_finite
from errata.edits.archive import Contents
from errata.edits.edit import Edit, Record, requests_as_json
from errata.edits.memories import MEMORIES
from errata.edits.memories.memory import Entry, Memory, Place
from errata.edits.memories.shared import Shared
from errata.edits.weights import base_hash, refuse_other_weights, whose
from errata.errors import EditFileError, EditStateError, NotFiniteError, WrongModelError
from errata.lm.load import LanguageModel
from errata.requests import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MemoryEdit(Edit):
    """Some entries of a memory beside the weights; make one with `of`."""

    kind: str
    """A key of `errata.edits.memories.MEMORIES`."""
    path: str
    """The module at which the memory sits."""
    tensors: Mapping[str, Tensor]
    """What the entries hold, by name, each (entries, ...)."""
    base: Mapping[str, str]
    """`base_hash` of the weights at that module: the model that the edit is for."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the memory is set; JSON values. Edits of other settings are another memory."""
    serves: tuple[tuple[int, ...], ...] = ()
    """For each entry the numbers of the requests that it is there for."""
    requests: tuple[Request, ...] = ()
    record: Record = field(default_factory=Record)
    shared: Shared | None = None
    """What it needs and shares with others (the setting `shared` names it); most need nothing."""

    def __post_init__(self) -> None:
        """Hold tuples and dictionaries of its own."""
        counts = {len(tensor) for tensor in self.tensors.values()}
        if counts - {len(self.serves)}:
            raise ValueError(f"{len(self.serves)} entries with {sorted(counts)} rows of tensors.")
        if any(not 0 <= i < len(self.requests) for entry in self.serves for i in entry):
            raise ValueError("an entry is there for a request that the edit does not have.")
        object.__setattr__(self, "serves", tuple(tuple(entry) for entry in self.serves))
        object.__setattr__(self, "tensors", dict(self.tensors))
        object.__setattr__(self, "base", dict(self.base))
        object.__setattr__(self, "settings", dict(self.settings))
        object.__setattr__(self, "requests", tuple(self.requests))

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        kind: str,
        path: str,
        tensors: Mapping[str, Tensor],
        *,
        requests: Sequence[Request],
        record: Record,
        settings: Mapping[str, Any] | None = None,
        serves: Sequence[Sequence[int]] | None = None,
        shared: Shared | None = None,
    ) -> Self:
        """The edit that adds these entries beside `lm`'s weights at `path`.

        Args:
            lm: the model.
            kind: of memory.
            path: the module at which it sits.
            tensors: by name, each (entries, ...).
            requests: what the model should say from now on.
            record: how the edit was made.
            settings: how the memory is set.
            serves: the requests of each entry, by number; by default there is one entry for each.
            shared: what the edit needs and shares with others.
        """
        settings = dict(settings or {}) | ({"shared": shared.name} if shared else {})
        base = {path: _base_hash(lm, path)}
        if serves is None:
            serves = [(number,) for number in range(len(requests))]
        kept = tuple(tuple(entry) for entry in serves)
        return cls(kind, path, tensors, base, settings, kept, tuple(requests), record, shared)

    @property
    def parts(self) -> tuple[Edit, ...]:
        """Itself."""
        return (self,)

    @property
    def paths(self) -> tuple[str, ...]:
        """No module's weights change."""
        return ()

    @property
    def nbytes(self) -> int:
        """What its entries take in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """What it holds, one by one."""
        return tuple(
            Entry(
                {name: tensor[i] for name, tensor in self.tensors.items()},
                tuple(self.requests[k] for k in served),
            )
            for i, served in enumerate(self.serves)
        )

    def apply_(self, lm: LanguageModel, *, force: bool = False) -> None:
        """Put the entries beside the weights until `undo_` (see `Edit.apply_`)."""
        if self.is_applied(lm):
            raise EditStateError(
                f"{self} is on {lm.name!r} already; take it back first, or leave it."
            )
        self.check(lm, force=force)
        held = lm.memories.get(self._key)
        if held is None:
            base = {self.path: base_hash(lm, self.path)} if force else self.base
            held = Held(MEMORIES[self.kind], Place(lm, self.path, self.settings, self.shared), base)
            lm.memories[self._key] = held
        held.add_(self)
        lm.applied.append(self)

    def undo_(self, lm: LanguageModel) -> None:
        """Take the entries back, also from between others (see `Edit.undo_`)."""
        found = self._on(lm)
        if found is None:
            raise EditStateError(f"{self} is not on {lm.name!r}, so it cannot be taken back.")
        del lm.applied[next(i for i, edit in enumerate(lm.applied) if edit is found)]
        held = lm.memories[self._key]
        held.remove_(found)
        if not held.edits:
            held.detach()
            del lm.memories[self._key]

    def is_applied(self, lm: LanguageModel) -> bool:
        """Whether this edit, or an equal one from a file, is on the model now."""
        return self._on(lm) is not None

    def check(self, lm: LanguageModel, *, force: bool = False) -> None:
        """Refuse a model that the edit was not made for; changes nothing.

        Raises:
            NotFiniteError: the edit holds NaN or infinity.
            WrongModelError: the module is missing, of another shape, or (without `force`) has
                other weights than those that the edit was made for.
        """
        held = lm.memories.get(self._key)
        try:
            lm.check_editable([self.path])
            # One that is there has what they share in memory already.
            place = held.place if held else Place(lm, self.path, self.settings, self.shared)
            misfit = MEMORIES[self.kind].misfit(place, self.tensors)
        except AttributeError:
            misfit = "there is no such module"
        if misfit:
            raise WrongModelError(
                f"{whose(self)}; it does not fit {lm.name!r}: at {self.path}, {misfit}."
            )
        for name, tensor in self.tensors.items():
            if not is_finite(tensor):
                raise NotFiniteError(f"{self} holds NaN or infinity in its {name}; make it anew.")
        if held is None or held.base != self.base:  # else they were compared when that one came
            refuse_other_weights(self, self.base, lm, force=force)

    def equals(self, other: object) -> bool:
        """Whether the other is this edit: the same, or equal in all but scores (to float32)."""
        if self is other:
            return True
        return (
            isinstance(other, MemoryEdit)
            and self._mark == other._mark
            and self.requests == other.requests
            and self._key == other._key
            and self.serves == other.serves
            and self.base == other.base
            and all(_equal(t, other.tensors[name]) for name, t in self.tensors.items())
        )

    def contents(self, dtype: torch.dtype = torch.float32) -> Contents:
        """What a file of this edit holds, tensors of floating point in `dtype`."""
        fields = {
            "memory": self.kind,
            "path": self.path,
            "settings": self.settings,
            "serves": self.serves,
            "base": self.base,
            "requests": requests_as_json(self.requests),
            "record": self.record.to_dict(),
        }
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
        }
        return Contents("memory", fields, tensors)

    @classmethod
    def from_contents(cls, contents: Contents) -> Self:
        """The edit that a file of kind "memory" holds.

        Raises:
            EditFileError: the memory is of a kind that this errata does not know.
        """
        fields = contents.fields
        if fields["memory"] not in MEMORIES:
            raise EditFileError(
                f"a memory of kind {fields['memory']!r} is unknown; this errata reads "
                f"{sorted(MEMORIES)}."
            )
        return cls(
            fields["memory"],
            fields["path"],
            contents.tensors,
            fields["base"],
            fields["settings"],
            tuple(tuple(entry) for entry in fields["serves"]),
            tuple(Request.from_dict(request) for request in fields["requests"]),
            Record.from_dict(fields["record"]),
            Shared(name) if (name := fields["settings"].get("shared")) else None,
        )

    def save_beside(self, folder: Path) -> None:
        """Write what it shares with others, unless the folder has it."""
        if self.shared is not None:
            self.shared.write_into(folder)

    @cached_property
    def _key(self) -> tuple[str, str, str]:
        return _key(self.kind, self.path, self.settings)

    @cached_property
    def _mark(self) -> int:
        """Equal for equal edits; quickly compared."""
        return hash((self._key, self.requests))

    def _on(self, lm: LanguageModel) -> MemoryEdit | None:
        """The edit on the model that is this one, or equal to it."""
        held = lm.memories.get(self._key)
        edits: list[MemoryEdit] = held.edits if held else []
        same = next((edit for edit in edits if edit is self), None)
        return same or next((edit for edit in edits if self.equals(edit)), None)

    def __str__(self) -> str:
        count = len(self.requests)
        about = f" ({self.requests[0].subject}{', ...' if count > 1 else ''})" if count else ""
        method = f"{self.record.method} edit" if self.record.method else "edit"
        return f"the {method} of {count} fact{'' if count == 1 else 's'}{about}"


class Held:
    """The memory of one kind, with the same settings, at one place of a model."""

    def __init__(self, kind: type[Memory], place: Place, base: Mapping[str, str]) -> None:
        self.place = place
        self.base = dict(base)
        self.edits: list[MemoryEdit] = []
        """Those on the model, in order."""
        self._aside: set[int] = set()
        self._texts: Counter[str] = Counter()
        self._empty = kind(place)
        self._built: tuple[tuple[Entry, ...], Memory] = ((), self._empty)
        self._live: tuple[Entry, ...] | None = ()
        self._handles = kind.attach(place, self.now)

    def now(self) -> Memory | None:
        """All entries that count, merged; None if there is none."""
        if self._live is None:
            self._live = self._entries()
        if not self._live:
            return None
        built, memory = self._built
        if built is not self._live:
            count = len(built)
            if len(self._live) > count and all(map(_is, built, self._live)):
                memory = memory.extended(self._live[count:])
            else:
                memory = self._empty.extended(self._live)
            self._built = self._live, memory
        return memory

    def add_(self, edit: MemoryEdit) -> None:
        """Take the entries of an edit in, after all others."""
        for text in {request.text for request in edit.requests} & self._texts.keys():
            logger.warning(
                "%r was edited before; from now on the later edit alone answers it.", text
            )
        self._texts.update(request.text for request in edit.requests)
        self.edits.append(edit)
        self._live = None

    def remove_(self, edit: MemoryEdit) -> None:
        """Forget the entries of an edit."""
        del self.edits[next(i for i, other in enumerate(self.edits) if other is edit)]
        self._texts -= Counter(request.text for request in edit.requests)
        self._live = None

    def detach(self) -> None:
        """Let go of the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def without(self, edits: Collection[MemoryEdit]) -> Iterator[None]:
        """While open, these edits do not count; what was merged is kept for afterwards."""
        before = self._live, self._aside
        self._aside = self._aside | {id(edit) for edit in edits}
        built = self._built
        self._live = None
        try:
            yield
        finally:
            (self._live, self._aside), self._built = before, built

    def _entries(self) -> tuple[Entry, ...]:
        """The entries that count, in order."""
        counting = [edit for edit in self.edits if id(edit) not in self._aside]
        if len(self._texts) == self._texts.total():  # nothing is written twice
            return tuple(entry for edit in counting for entry in edit.entries)
        return live_entries(counting)


def live_entries(edits: Sequence[MemoryEdit]) -> tuple[Entry, ...]:
    """The entries of edits in order, without those for prompts that a later edit writes anew."""
    later: set[str] = set()
    kept: list[Entry] = []
    for edit in reversed(edits):
        for entry in reversed(edit.entries):
            if not all(request.text in later for request in entry.requests):
                kept.append(entry)
        later.update(request.text for request in edit.requests)
    return tuple(reversed(kept))


@contextmanager
def set_aside(
    lm: LanguageModel, kind: str, path: str, texts: Collection[str] | None = None
) -> Iterator[None]:
    """While open, edits of one kind at one place are as if not on the model.

    An editor computes a new edit so. Weights and other memories stay as they are.

    Args:
        lm: the model.
        kind: of memory.
        path: the module.
        texts: only edits of some of these prompts, which the new edit writes anew; None for all.
    """
    with ExitStack() as opened:
        for (held_kind, held_path, _), held in lm.memories.items():
            if (held_kind, held_path) == (kind, path):
                edits = [
                    edit
                    for edit in held.edits
                    if texts is None or any(request.text in texts for request in edit.requests)
                ]
                opened.enter_context(held.without(edits))
        yield


def memory_at(
    lm: LanguageModel, kind: str, path: str, settings: Mapping[str, Any]
) -> Memory | None:
    """What edits of one kind and settings hold at a place of the model; None if nothing."""
    held = lm.memories.get(_key(kind, path, settings))
    return held.now() if held else None


def _key(kind: str, path: str, settings: Mapping[str, Any]) -> tuple[str, str, str]:
    """What edits of one memory have in common."""
    return kind, path, json.dumps(settings, sort_keys=True)


def _base_hash(lm: LanguageModel, path: str) -> str:
    """`base_hash`, as far as it is known from memories at that place."""
    for held in lm.memories.values():
        if path in held.base and held.place.path == path:
            return str(held.base[path])
    return base_hash(lm, path)


def _is(a: object, b: object) -> bool:
    return a is b


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu().float(), b.cpu().float())
