"""Neurons beside an MLP, which fire token by token (T-Patcher).

Huang et al. 2023, arXiv:2301.09785. No prompt is asked for: every token drives every neuron, as it
drives those of the MLP, and all of them together are two matrices. What drives them goes into the
MLP's first matrix, and what they add comes out of its last, where the memory sits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from errata.algebra.neurons import Neurons
from errata.edits.memories.memory import Entry, Memory, Place, shapes_misfit
from errata.lm.hooks import attach
from errata.lm.weights import weight_out_in


class NeuronMemory(Memory):
    """Entries are the keys (n, d_in), biases (n,) and values (n, d_out) of `Neurons`.

    The setting `layer` is the number of the block whose MLP it is.
    """

    def __init__(self, place: Place) -> None:
        """No neuron."""
        super().__init__(place)
        self.act = place.lm.activation

        self.neurons = Neurons(
            *(place.rows([torch.zeros(width)])[:0] for width in _widths(place).values())
        )

    @classmethod
    def misfit(cls, place: Place, tensors: Mapping[str, Tensor]) -> str:
        """Why neurons, or the settings, do not fit; empty if they do."""
        layer = place.settings.get("layer")
        if not isinstance(layer, int) or not 0 <= layer < place.lm.layers:
            return f"neurons cannot be set like {dict(place.settings)}"
        if place.lm.mlp_out_path(layer) != place.path:
            return f"there is no last matrix of block {layer}'s MLP"
        return shapes_misfit(tensors, _widths(place))

    def extended(self, entries: Sequence[Entry]) -> Self:
        """These neurons after those that are there."""
        new = Neurons(
            *(
                self.place.rows([entry.tensors[name] for entry in entries])
                for name in _widths(self.place)
            )
        )
        more = type(self)(self.place)
        more.neurons = Neurons.joined([self.neurons, new])
        return more

    def rewritten(self, states: Tensor, output: Tensor) -> Tensor:
        """The MLP's output, with what the neurons add to it.

        Args:
            states: (rows, tokens, d_in) what goes into the MLP's first matrix.
            output: (rows, tokens, d_out) what comes out of its last.
        """
        return output + self.neurons(states, self.act).to(output)

    @classmethod
    def attach(cls, place: Place, now: Callable[[], Self | None]) -> list[RemovableHandle]:
        """Watch the first matrix, and add to what the last one says."""
        seen: list[Tensor] = []

        def watch(states: Tensor, output: Tensor) -> Tensor:
            seen[:] = [states]
            return output

        def rewrite(_: Tensor, output: Tensor) -> Tensor:
            states, memory = seen.pop(), now()
            return output if memory is None else memory.rewritten(states, output)

        first = place.lm.mlp_in(place.settings["layer"])
        return [*attach(first, watch), *attach(place.module, rewrite)]


def _widths(place: Place) -> dict[str, tuple[int, ...]]:
    d_in = weight_out_in(place.lm.mlp_in(place.settings["layer"])).shape[1]
    return {"keys": (d_in,), "biases": (), "values": (place.sizes[0],)}
