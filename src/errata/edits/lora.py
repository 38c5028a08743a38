"""Edits as PEFT LoRA adapters, for servers and tools that know LoRA and not errata.

A LoRA adds `scale * B A` to a weight, with scale = alpha / rank. Here B = left, A = right, and
alpha = rank for each module, so the scale is 1 and the adapter is the edit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from errata.edits.archive import write_whole
from errata.edits.edit import Edit
from errata.edits.stack import weight_changes
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, StorageError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in


def to_lora(edit: Edit, lm: LanguageModel, folder: Path | str) -> None:
    """Write an edit or stack as an adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        edit: low-rank changes to weights.
        lm: the model that the edit was made for; it is read, not changed.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ConfigError: the edit is not a change of weights, so it is no LoRA.
        NotFiniteError: the edit holds NaN or infinity.
        StorageError: the files cannot be written.
        WrongModelError: the edit was made for another model.
    """
    for part in edit.parts:
        if not isinstance(part, WeightEdit):
            raise ConfigError(
                f"{part} does not change weights, so it cannot become a LoRA adapter."
            )
        part.check(lm)
    changes = weight_changes(edit)
    if not changes:
        raise ConfigError(f"{edit} changes nothing, so there is no adapter to write.")
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        for name, factor in ("lora_A", change.right), ("lora_B", change.left):
            factor = factor.detach().to("cpu", torch.float32)
            tensors[f"base_model.model.{path}.{name}.weight"] = factor.clone(
                memory_format=torch.contiguous_format
            )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}.") from error
    write_whole(
        folder / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"})
    )
    config = json.dumps(
        _config(lm, {path: change.rank for path, change in changes.items()}), indent=2
    )
    write_whole(folder / "adapter_config.json", config.encode())


def _config(lm: LanguageModel, ranks: dict[str, int]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "inference_mode": True,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "fan_in_fan_out": any(_stores_in_out(lm, path) for path in ranks),
    }


def _stores_in_out(lm: LanguageModel, path: str) -> bool:
    """Whether the layer keeps its weight as (d_in, d_out), so that the usual view is transposed."""
    layer = lm.module(path)
    assert isinstance(layer.weight, Tensor)
    return weight_out_in(layer).stride() != layer.weight.stride()
