"""Training a pocket model on a lesson, with checkpoints from which a killed run goes on."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.errors import GrowError
from errata.pocket.lessons import Lesson
from errata.pocket.shapes import GrowConfig

CHECKPOINT = "checkpoint.safetensors"


class Report(NamedTuple):
    """How far a run is."""

    step: int
    steps: int
    loss: float
    """Mean of the last steps, nats a prediction."""

    tokens_per_second: float
    seconds_left: float
    stage: str = "growing"


Watch = Callable[[Report], None]


class State(NamedTuple):
    """What a checkpoint says beside its tensors."""

    step: int
    loss: float
    seconds: float
    """Spent training so far."""
    tokens: int
    """Read so far."""


def train(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lesson: Lesson,
    config: GrowConfig,
    folder: Path,
    *,
    told: Mapping[str, Any],
    resume: bool,
    progress: Watch,
) -> tuple[GrowConfig, State]:
    """Trains a network in place; its last state stays in the folder as a checkpoint.

    Args:
        network: what to train, in float32, on its device.
        tokenizer: its tokenizer.
        lesson: what it reads.
        config: how long, and how fast.
        folder: where the checkpoint is kept.
        told: what else must be the same in a run that goes on from a checkpoint.
        resume: go on from the folder's checkpoint if there is one.
        progress: called after every step.

    Returns:
        The config, with `minutes` turned into steps, and how it ended.

    Raises:
        GrowError: the checkpoint cannot be written, or is another run's; the loss is not finite.
    """
    network.train()
    if config.minutes is not None:
        steps = _steps_in(config.minutes, network, tokenizer, lesson, config)
        config = replace(config, steps=steps, minutes=None)
    optimizer = _optimizer(network, config)
    identity = _identity(config, told)
    state = State(0, math.nan, 0.0, 0)
    if resume and (folder / CHECKPOINT).exists():
        state = _load_checkpoint(folder, network, optimizer, identity)
    first, loss, spent, read = state
    start = saved = time.monotonic()
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.zero_grad()
        taken = lesson.descend(network, tokenizer, step)
        if not math.isfinite(taken.loss):
            raise GrowError(f"the loss is not finite at step {step}; try a lower learning rate.")
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        loss = taken.loss if math.isnan(loss) else 0.98 * loss + 0.02 * taken.loss
        read += taken.tokens
        now = time.monotonic()
        passed = now - start
        left = passed / (step + 1 - first) * (config.steps - step - 1)
        progress(Report(step + 1, config.steps, loss, (read - state.tokens) / passed, left))
        if now - saved > config.checkpoint_seconds:
            saved = now
            reached = State(step + 1, loss, spent + passed, read)
            _save_checkpoint(folder, network, optimizer, reached, identity)
    passed = time.monotonic() - start
    state = State(max(config.steps, first), loss, spent + passed, read)
    _save_checkpoint(folder, network, optimizer, state, identity)
    return config, state


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes aside, then renames: a run killed at any moment leaves the old file or the new one.

    Raises:
        GrowError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        # Safetensors makes files that only their owner reads.
        aside.chmod(mode)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise GrowError(f"cannot write {path}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _optimizer(network: nn.Module, config: GrowConfig) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _identity(config: GrowConfig, told: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change between a run and its continuation; how long it lasts may."""
    values = asdict(config)
    for free in ("steps", "minutes", "checkpoint_seconds"):
        del values[free]
    return values | dict(told)


def _save_checkpoint(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    identity: Mapping[str, Any],
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().cpu()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu()
    told = {"state": json.dumps(state._asdict()), "identity": json.dumps(identity)}
    replace_file(folder / CHECKPOINT, lambda aside: save_file(tensors, aside, metadata=told))


def _load_checkpoint(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> State:
    path = folder / CHECKPOINT
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            if (before := json.loads(told["identity"])) != identity:
                other = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
                raise GrowError(
                    f"{path} is of another run: {', '.join(other)} differ.\n"
                    "  Give the same settings and facts, or another folder, or leave out --resume."
                )
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                    optimizer.state[parameter] = {
                        # Fused kernels want the step on the device too.
                        key: file.get_tensor(f"{key}.{name}").to(parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            return State(**json.loads(told["state"]))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise GrowError(f"cannot continue from {path}: {error}") from error


def _steps_in(
    minutes: float,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lesson: Lesson,
    config: GrowConfig,
) -> int:
    """How many steps this machine does in that time, tried on a copy."""
    trial = copy.deepcopy(network)
    optimizer = _optimizer(trial, config)
    seconds = []
    for step in range(4):
        start = time.monotonic()
        lesson.descend(trial, tokenizer, step)
        optimizer.step()
        seconds.append(time.monotonic() - start)
    return max(1, round(60 * minutes / min(seconds)))
