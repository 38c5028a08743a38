"""How large a model is, also one whose weights are not here: enough to say what work will cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from errata.errors import ErrataError
from errata.lm.anatomy import anatomy_of
from errata.lm.heads import head_of
from errata.lm.load import POCKET, pocket_folder
from errata.lm.weights import weight_out_in


@dataclass(frozen=True)
class Shape:
    """The numbers that decide what a model costs."""

    layers: int
    d_model: int
    d_ff: int
    """Width of the MLP: that of its keys."""
    vocabulary: int
    parameters: int

    @classmethod
    def of(cls, layers: int, d_model: int, d_ff: int, vocabulary: int) -> Self:
        """A plain decoder: four square matrices and two of the MLP in a block, one embedding."""
        block = 4 * d_model**2 + 2 * d_model * d_ff
        return cls(layers, d_model, d_ff, vocabulary, layers * block + vocabulary * d_model)

    @property
    def flops(self) -> int:
        """Of one token through all blocks: a product and a sum for each of their weights."""
        return 2 * (self.parameters - self.vocabulary * self.d_model)


def is_here(name: str) -> bool:
    """Whether a model's weights are on this machine: embedded, a folder, or fetched before."""
    if name in POCKET or Path(name).is_dir():
        return True
    weights = ("model.safetensors", "model.safetensors.index.json")
    return any(_fetched(name, file) for file in weights)


def shape_named(name: str) -> Shape | None:
    """The shape that a model's config.json tells, if that is on this machine."""
    source = str(pocket_folder(name)) if name in POCKET else name
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        return _shape(config)
    except (OSError, ValueError, ErrataError):  # no such file, or none of a family that we know
        return None


def _shape(config: PretrainedConfig) -> Shape:
    anatomy = anatomy_of(config)
    with torch.device("meta"):  # shapes without numbers
        network: Any = head_of(anatomy.kind, config.architectures or []).auto.from_config(config)
    keys = weight_out_in(network.get_submodule(anatomy.mlp_out.format(0))).shape[1]
    blocks = network.get_submodule(anatomy.block.removesuffix(".{}"))
    return Shape(
        layers=len(blocks),
        d_model=int(config.hidden_size),
        d_ff=int(keys),
        vocabulary=int(config.vocab_size),
        parameters=sum(weight.numel() for weight in network.parameters()),
    )


def _fetched(name: str, file: str) -> bool:
    try:
        return cached_file(name, file, local_files_only=True) is not None
    except (OSError, ValueError):  # it is not there, or that is no name that the Hub could have
        return False
