"""Small random edits for the tiny models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.requests import Request


def make_edit(
    lm: LanguageModel,
    seed: int = 0,
    *,
    layers: tuple[int, ...] = (1, 2),
    size: float = 0.1,
    dtype: torch.dtype = torch.float64,
    subject: str | None = None,
    target: str = "Rome",
) -> WeightEdit:
    """A random rank-2 edit of the MLP outputs of `layers`."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for layer in layers:
        d_out, d_in = weight_out_in(lm.mlp_out(layer)).shape
        left = torch.randn(d_out, 2, generator=generator, dtype=dtype) * size
        changes[lm.mlp_out_path(layer)] = LowRank(
            left, torch.randn(2, d_in, generator=generator, dtype=dtype)
        )
    request = Request("The capital of {} is", subject or f"Land {seed}", target, "Paris")
    record = Record.of(lm, method="random", config={"size": size}, seed=seed)
    return WeightEdit.of(lm, changes, requests=[request], record=record)


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    """A copy of all of the model's numbers."""
    return {name: tensor.clone() for name, tensor in lm.network.state_dict().items()}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two copies are equal bit for bit (NaN and signed zero included)."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(
            a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)
        )
        for name in a
    )
