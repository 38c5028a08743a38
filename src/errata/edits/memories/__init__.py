"""The kinds of memory that an edit beside the weights may hold: one small class each, listed here.

To add a kind, write a subclass of `errata.edits.memories.memory.Memory` in a file of this folder
(what it holds, how entries are merged, what it does to a pass) and add its line to MEMORIES. Then
`MemoryEdit.of(lm, kind, path, tensors, ...)` makes edits of it, which apply, undo, stack, save and
load as all edits do.
"""

from __future__ import annotations

from errata.edits.memories.codebook import Codebook
from errata.edits.memories.counterfactual import CounterfactualMemory
from errata.edits.memories.experts import Experts
from errata.edits.memories.memory import Memory
from errata.edits.memories.neurons import NeuronMemory

MEMORIES: dict[str, type[Memory]] = {  # the kind in a file -> what merges and answers
    "codebook": Codebook,
    "counterfactual": CounterfactualMemory,
    "neurons": NeuronMemory,
    "experts": Experts,
}
