"""Experts: matrices of their own for single prompts, each switched on by a neuron (SCEN).

Yao et al. 2024, arXiv:2404.02699. At a row's last prompt token the input q of a matrix W is shown
to all indexing neurons at once (equations 9 and 10),

    a = sigmoid(W_merge q),

and the row is then run, to its end, on the matrix of the expert with the largest a_i where that is
above the threshold, and on W elsewhere (equations 11 and 12). An expert is kept as the change that
it makes to W, left @ right, so that a row costs two thin products more; rows of one batch may have
an expert each. The prompts' own inputs are kept too: later neurons are trained against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from errata.edits.memories.memory import Entry, Memory, Place, shapes_misfit


class Experts(Memory):
    """Entries: neurons (n, d_in), left (n, d_out, r), right (n, r, d_in), prompts (n, k, d_in).

    Of an expert for several requests, `prompts` has their inputs one after another; rows beyond
    their number are none. Settings: `threshold`.
    """

    def __init__(self, place: Place) -> None:
        """No expert: W for all."""
        super().__init__(place)
        _, d_in = place.sizes
        self.neurons = place.rows([torch.zeros(d_in)])[:0]
        """(m, d_in) W_merge."""
        self.entries: tuple[Entry, ...] = ()

    @classmethod
    def misfit(cls, place: Place, tensors: Mapping[str, Tensor]) -> str:
        """Why experts, or the settings, do not fit; empty if they do."""
        if set(place.settings) != {"threshold"}:
            return f"experts cannot be set like {dict(place.settings)}"
        d_out, d_in = place.sizes
        wanted: dict[str, tuple[int | None, ...]] = {
            "neurons": (d_in,),
            "left": (d_out, None),
            "right": (None, d_in),
            "prompts": (None, d_in),
        }
        return shapes_misfit(tensors, wanted)

    def extended(self, entries: Sequence[Entry]) -> Self:
        """These experts too."""
        if not entries:
            return self
        grown = type(self)(self.place)
        new = self.place.rows([entry.tensors["neurons"] for entry in entries])
        grown.neurons = torch.cat([self.neurons, new])
        grown.entries = (*self.entries, *entries)
        return grown

    def activations(self, queries: Tensor) -> Tensor:
        """(n, m) how strongly each neuron answers to queries (n, d_in): a of equation 10."""
        return self.activated(self.neurons, queries)

    @staticmethod
    def activated(neurons: Tensor, queries: Tensor) -> Tensor:
        """(n, m) how strongly neurons (m, d_in) answer to queries (n, d_in)."""
        return (queries.to(neurons) @ neurons.mT).sigmoid()

    def prompts_without(self, texts: Sequence[str]) -> Tensor:
        """(k, d_in) the inputs at all prompts but these: what a new neuron must not answer to."""
        kept = [
            entry.tensors["prompts"][i]
            for entry in self.entries
            for i, request in enumerate(entry.requests)
            if request.text not in texts
        ]
        return self.place.rows(kept) if kept else self.neurons[:0]

    def rewritten(self, states: Tensor, output: Tensor) -> Tensor:
        """The output, with their experts' changes in the rows that have one."""
        prompts = self.place.prompts
        if prompts.start == 0:
            every = torch.arange(len(states), device=states.device)
            queries = states[every, prompts.ends.to(states.device)]
            largest, expert = self.activations(queries).max(dim=1)
            rows = (largest > float(self.place.settings["threshold"])).nonzero()[:, 0]
            chosen = [self.entries[i].tensors for i in expert[rows].tolist()]
            # Ranks may differ from edit to edit: a row with fewer factors is filled up with zeros.
            prompts.kept[self.place] = (
                rows,
                *(
                    _stacked(self.place, [one[name] for one in chosen], dim)
                    for name, dim in (("left", 1), ("right", 0))
                ),
            )
        rows, left, right = prompts.kept[self.place]
        if not len(rows):
            return output
        change = (states[rows].to(right) @ right.mT) @ left.mT
        return output.index_add(0, rows, change.to(output))


def _stacked(place: Place, factors: Sequence[Tensor], dim: int) -> Tensor:
    """(k, ...) factors one upon the other, all of the largest rank among them."""
    if not factors:
        return torch.zeros(0)
    rank = max(factor.shape[dim] for factor in factors)
    filled = [
        factor
        if factor.shape[dim] == rank
        else torch.cat(
            [
                factor,
                factor.new_zeros([rank - n if d == dim else n for d, n in enumerate(factor.shape)]),
            ],
            dim=dim,
        )
        for factor in factors
    ]
    return place.rows(filled)
