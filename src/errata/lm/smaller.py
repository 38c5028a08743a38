"""Smaller models beside a model: its own first blocks, or another of the same vocabulary."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from errata.errors import ConfigError
from errata.lm.anatomy import anatomy_of
from errata.lm.heads import head_of
from errata.lm.load import LanguageModel

_DECODER_DEPTHS = ("num_decoder_layers", "decoder_layers")
"""What configurations call the depth of an encoder-decoder's second stack."""


def first_blocks(lm: LanguageModel, count: int) -> PreTrainedModel:
    """A copy of a model that ends after its first blocks (of both stacks, where there are two).

    Embeddings, last norm and head are the model's own; in float32, on its device.

    Raises:
        ConfigError: the model has not so many blocks.
    """
    if not 0 < count <= lm.layers:
        raise ConfigError(f"{lm.name} has {lm.layers} blocks; its first {count} are not there.")
    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = count
    for name in _DECODER_DEPTHS:
        if hasattr(config, name):
            setattr(config, name, count)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    network = rebuilt(described(type(lm.network), config))
    own = lm.network.state_dict()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(own[name])
    nn.Module.to(network, lm.device)
    return network


def described(kind: type[PreTrainedModel], config: Any) -> dict[str, Any]:
    """A network's class and configuration, as JSON."""
    told: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {"class": kind.__name__, "config": told}


def rebuilt(description: Mapping[str, Any]) -> PreTrainedModel:
    """A network as `described`, in float32 and evaluation mode, with weights yet to be filled."""
    values = {k: v for k, v in description["config"].items() if k not in ("model_type", "dtype")}
    config = AutoConfig.for_model(description["config"]["model_type"], **values)
    head = head_of(anatomy_of(config).kind, [description["class"]])
    state = torch.random.get_rng_state()
    network: PreTrainedModel = head.auto.from_config(config)
    torch.random.set_rng_state(state)
    network.float()
    network.eval()
    return network


def same_vocabulary(lm: LanguageModel, other: LanguageModel) -> None:
    """Refuse a model that does not read and write the very tokens of `lm`.

    Raises:
        ConfigError: its kind, head or vocabulary is another.
    """
    if (other.kind, other.task, other.labels) != (lm.kind, lm.task, lm.labels):
        raise ConfigError(
            f"{other.name} is no smaller {lm.name}: it is an {other.kind} ({other.task}), and "
            f"{lm.name} an {lm.kind} ({lm.task}); they must answer alike."
        )
    if other.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise ConfigError(
            f"{other.name} has another vocabulary than {lm.name}; take a smaller model of the same "
            "family, or leave it out for the model's own first blocks."
        )
