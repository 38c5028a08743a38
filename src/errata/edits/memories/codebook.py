"""Codebook: keys with a radius and a value each; near a key, a layer gives its value (GRACE).

Hartvigsen et al. 2023, arXiv:2211.11031, and their reference code. A row's query q is the layer's
input at its last prompt token; with the nearest key k_j, at the distance d = |q - k_j|, the layer's
output there is replaced by the value v_j where d <= eps_j, and left as it is elsewhere.

The book is a fold over entries (q, v, eps, label), eps being the radius that a key begins with:

- add: the book is empty or d > eps + eps_j: a new key q, with eps and v;
- split: the nearest key is of another label: a new key too, and half the distance for each,
  eps_j = d / 2 - 1e-5 and d / 2 for the new one;
- cover: it is of the same label: its radius grows to d if that is larger, and its value becomes
  v, which was trained on from the value that stood there.

So every entry keeps what it was trained to, and without any of them the radii are those that the
others would have had alone. Labels are equal if their texts are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from errata.edits.memories.memory import Entry, Memory, Place, shapes_misfit
from errata.lm.prompts import Prompts

Replace = Literal["last", "prompt", "before", "all"]
"""Which tokens' output is replaced: the prompt's last; all of the prompt; the prompt without its
last (as the reference code's "prompt" does); all, those that follow it included."""

_MARGIN = 1e-5
"""What the earlier of two keys is given less at a split."""


class Codebook(Memory):
    """Entries: keys (n, d_in), values (n, d_out), radii (n,). Settings: `replace`."""

    def __init__(self, place: Place) -> None:
        """The empty book."""
        super().__init__(place)
        d_out, d_in = place.sizes
        self.keys = place.rows([torch.zeros(d_in)])[:0]
        """(m, d_in)"""
        self.values = place.rows([torch.zeros(d_out)])[:0]
        """(m, d_out)"""
        self.radii = self.keys[:, 0]
        """(m,)"""
        self.labels: list[str] = []

    @cached_property
    def _squares(self) -> Tensor:
        """(m,) of the keys' lengths."""
        return self.keys.square().sum(1)

    @classmethod
    def misfit(cls, place: Place, tensors: Mapping[str, Tensor]) -> str:
        """Why keys and values, or the settings, do not fit; empty if they do."""
        if place.settings.get("replace") not in get_args(Replace):
            return f"a codebook cannot be set like {dict(place.settings)}"
        d_out, d_in = place.sizes
        return shapes_misfit(tensors, {"keys": (d_in,), "values": (d_out,), "radii": ()})

    def extended(self, entries: Sequence[Entry]) -> Self:
        """The book after these entries too."""
        if not entries:
            return self
        keys, values, radii = (
            torch.cat([old, old.new_zeros(len(entries), *old.shape[1:])])
            for old in (self.keys, self.values, self.radii)
        )
        labels = list(self.labels)
        squares = keys.square().sum(1)
        new_keys = self.place.rows([e.tensors["keys"] for e in entries])
        new_values = self.place.rows([e.tensors["values"] for e in entries])
        for entry, key, value in zip(entries, new_keys, new_values, strict=True):
            label, radius = entry.requests[0].target.strip(), float(entry.tensors["radii"])
            if labels:
                distance, j = _nearest(keys[: len(labels)], squares[: len(labels)], key[None])
                d, at = float(distance), int(j)
                if d <= radius + float(radii[at]):
                    if labels[at] == label:
                        radii[at] = max(float(radii[at]), d)
                        values[at] = value
                        continue
                    radii[at], radius = d / 2 - _MARGIN, d / 2
            here = len(labels)
            keys[here], values[here], radii[here] = key, value, radius
            squares[here] = key.square().sum()
            labels.append(label)
        book, count = type(self)(self.place), len(labels)
        book.keys, book.values, book.radii = keys[:count], values[:count], radii[:count]
        book.labels = labels
        return book

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (n,) of queries (n, d_in) to the nearest keys of a book with some, and which."""
        return _nearest(self.keys, self._squares, queries.to(self.keys))

    def rewritten(self, states: Tensor, output: Tensor) -> Tensor:
        """The output, with values where a row's query is near a key."""
        prompts = self.place.prompts
        replace: Replace = self.place.settings["replace"]
        if prompts.start == 0:
            every = torch.arange(len(states), device=states.device)
            distance, j = self.nearest(states[every, prompts.ends.to(states.device)])
            prompts.kept[self.place] = hits = (distance <= self.radii[j]).cpu(), self.values[j]
        elif replace != "all":
            return output
        else:
            hits = prompts.kept[self.place]
        near, values = hits
        if not near.any():
            return output
        chosen = replaced(replace, prompts, states.shape[1]) & near[:, None]
        return torch.where(chosen[..., None].to(output.device), values[:, None].to(output), output)


def replaced(replace: Replace, prompts: Prompts, tokens: int) -> Tensor:
    """(rows, tokens) which outputs are replaced by a row's value; on the CPU."""
    columns = torch.arange(prompts.start, prompts.start + tokens)
    ends = prompts.ends[:, None]
    return {
        "last": columns == ends,
        "prompt": columns <= ends,
        "before": columns < ends,
        "all": (columns >= 0).expand(len(ends), -1),
    }[replace]


def _nearest(keys: Tensor, squares: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (n,) and numbers (n,) of the keys (m, d) nearest to queries (n, d).

    Found with one product; the distance to the one that is found is computed as it is defined.
    """
    scores = torch.addmm(squares, queries, keys.mT, alpha=-2)
    j = scores.argmin(dim=1)
    return (queries - keys[j]).norm(dim=1), j
