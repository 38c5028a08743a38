"""Weights as (d_out, d_in), whatever a layer stores, and the hashes that identify them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.errors import ConfigError


def weight_out_in(layer: nn.Module) -> Tensor:
    """The weight as a (d_out, d_in) view that shares memory with the layer.

    GPT-2's Conv1D stores (d_in, d_out). Asking the type, not the shape, gets square weights
    right too.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return out_in(layer, weight)


def out_in(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the layout of the layer's weight, as a (d_out, d_in) view."""
    return weight.detach().T if isinstance(layer, Conv1D) else weight.detach()


def check_whole(weight: Tensor, name: str = "a weight") -> None:
    """Refuse a weight whose numbers are not all here.

    Raises:
        ConfigError: it was offloaded by a device map, or cut by tensor parallelism.
    """
    if weight.is_meta:
        raise ConfigError(
            f"{name} was offloaded by the model's device map, so it is not here to be read or "
            "edited. Edit another block, or load the model where all of it has room."
        )
    if hasattr(weight, "full_tensor"):  # one of several parts
        raise ConfigError(
            f"{name} is cut into parts by tensor parallelism; errata reads and edits whole "
            "weights. Load the model with a device_map instead, which puts whole blocks on devices."
        )


def weight_hash(weight: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes; hexadecimal. Equal for equal bits, on any device.

    Raises:
        ConfigError: its numbers are not all here.
    """
    check_whole(weight)
    weight = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
