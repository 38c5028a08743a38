"""Memory: what the entries of one kind at one place of a model say together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.edits.memories.shared import Shared
from errata.lm.hooks import attach
from errata.lm.load import LanguageModel
from errata.lm.prompts import Prompts, current
from errata.lm.weights import weight_out_in
from errata.requests import Request


@dataclass(frozen=True, eq=False)
class Entry:
    """One thing that a memory holds: a key with its value, an expert, a neuron ..."""

    tensors: Mapping[str, Tensor]
    """Its row of each of the edit's tensors."""
    requests: tuple[Request, ...]
    """What it is there for."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a memory sits, and how it is set."""

    lm: LanguageModel
    path: str
    """The module."""
    settings: Mapping[str, Any]
    """What all edits of one memory agree in; JSON values."""
    shared: Shared | None = None
    """What they share beside that."""

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.lm.module(self.path)

    @property
    def sizes(self) -> tuple[int, int]:
        """(d_out, d_in) of the module's matrix."""
        d_out, d_in = weight_out_in(self.module).shape
        return d_out, d_in

    @property
    def prompts(self) -> Prompts:
        """Where the prompts end in the pass that now goes through the module.

        Raises:
            HookError: the pass was begun without a word on them.
        """
        return current(self.lm, self.path)

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of one shape, one upon the other, on the module's device in float32 or wider."""
        weight = weight_out_in(self.module)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.stack(list(tensors)).to(weight.device, wide)


class Memory(ABC):
    """Entries, merged. Immutable; a kind is a subclass, listed in `errata.edits.memories`.

    It is a pure fold over the entries in the order of their edits, `empty` first: what is left
    after an edit in the middle is taken back is then what would have been without it. A kind may
    override `attach` if it does more than rewrite one module's output.
    """

    def __init__(self, place: Place) -> None:
        """The memory without an entry, at a place."""
        self.place = place

    @classmethod
    @abstractmethod
    def misfit(cls, place: Place, tensors: Mapping[str, Tensor]) -> str:
        """Why an edit's tensors, each (entries, ...), do not fit that place; empty if they do."""

    @abstractmethod
    def extended(self, entries: Sequence[Entry]) -> Self:
        """A memory that holds these entries too, after its own."""

    @abstractmethod
    def rewritten(self, states: Tensor, output: Tensor) -> Tensor:
        """What the module shall return, (rows, tokens, d_out).

        Args:
            states: (rows, tokens, d_in) what goes in.
            output: (rows, tokens, d_out) what comes out; it is not to be written into.
        """

    @classmethod
    def attach(cls, place: Place, now: Callable[[], Self | None]) -> list[RemovableHandle]:
        """Hang on to the model until the handles are removed.

        Args:
            place: where.
            now: the memory as it is when a pass comes by; None while there is nothing in it.
        """

        def rewrite(states: Tensor, output: Tensor) -> Tensor:
            memory = now()
            return output if memory is None else memory.rewritten(states, output)

        return attach(place.module, rewrite)


def shapes_misfit(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int | None, ...]]
) -> str:
    """Why tensors are not of the shapes after their first dimension; empty if they are.

    Args:
        tensors: by name, each (entries, ...).
        wanted: by name; None stands for any size.
    """
    if tensors.keys() != wanted.keys():
        return f"it has the tensors {sorted(tensors)}, not {sorted(wanted)}"
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape[1:])
        fits = len(found) == len(shape) and all(
            w is None or f == w for f, w in zip(found, shape, strict=True)
        )
        if not fits:
            return f"{name} are {found}, not {tuple('any' if w is None else w for w in shape)}"
    return ""
