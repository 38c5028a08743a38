"""Weights as (d_out, d_in), whatever a layer stores, and the hashes that identify them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def weight_out_in(layer: nn.Module) -> Tensor:
    """The weight as a (d_out, d_in) view that shares memory with the layer.

    GPT-2's Conv1D stores (d_in, d_out). Asking the type, not the shape, gets square weights
    right too.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(layer, Conv1D) else weight.detach()


def weight_hash(weight: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes; hexadecimal. Equal for equal bits, on any device."""
    weight = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
