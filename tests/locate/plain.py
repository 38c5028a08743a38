"""Causal tracing as one would write it first: a full pass of all rows for each place restored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from errata.lm.load import LanguageModel
from errata.lm.tokens import encode_requests
from errata.locate.tracing import Kind, Noise, Part
from errata.requests import Request


@torch.no_grad()
def plain(
    lm: LanguageModel,
    request: Request,
    noise: Noise,
    *,
    kind: Kind = "state",
    window: int = 1,
    severed: Part | None = None,
    answer: str | None = None,
) -> tuple[float, float, Tensor]:
    """P, P* and P restored (tokens, layers); the noise's unit is the embeddings' own."""
    asked = request if answer is None else replace(request, target=answer)
    (row,) = encode_requests(lm, [asked], target=answer is not None)
    prompt, hidden = row.prompt_length, slice(row.subject_first, row.subject_last + 1)
    ids = torch.tensor([row.ids[: len(row.ids) - (answer is not None)]] * (1 + noise.samples))
    generator = np.random.RandomState(noise.seed)
    shape = (noise.samples, hidden.stop - hidden.start, lm.embedding(ids).shape[-1])
    if noise.distribution == "gaussian":
        values = noise.scale * generator.randn(*shape)
    else:
        values = noise.scale * generator.uniform(-1, 1, shape)

    def corrupted(output: Tensor) -> None:
        if noise.replace:
            output[1:, hidden] = 0
        output[1:, hidden] += torch.from_numpy(values).to(output)

    def run(changes: dict[nn.Module, Callable[[Tensor], None]]) -> Tensor:
        def hook(change: Callable[[Tensor], None]) -> Any:
            def changed(_module: nn.Module, _args: Any, output: Any) -> Any:
                states = (output[0] if isinstance(output, tuple) else output).clone()
                change(states.view(*ids.shape, -1))
                return (states, *output[1:]) if isinstance(output, tuple) else states

            return changed

        with ExitStack() as stack:
            for module, change in {lm.embedding: corrupted, **changes}.items():
                stack.callback(module.register_forward_hook(hook(change)).remove)
            logits = lm.network(input_ids=ids, use_cache=False).logits
        chances = logits.double().softmax(dim=2)
        wanted = row.answer if answer is not None else [int(chances[0, -1].argmax())]
        product = torch.ones(len(ids), dtype=torch.float64)
        for place, token in enumerate(wanted, prompt - 1):
            product *= chances[:, place, token]
        return product

    def modules(part: str, layers: range) -> list[nn.Module]:
        return [getattr(lm, "block" if part == "state" else part)(layer) for layer in layers]

    def clean(token: int) -> Callable[[Tensor], None]:
        def change(output: Tensor) -> None:
            output[1:, token] = output[0, token]

        return change

    def as_before(token: int, before: Tensor) -> Callable[[Tensor], None]:
        def change(output: Tensor) -> None:
            output[1:, token] = before[1:, token]

        return change

    seen: dict[nn.Module, Tensor] = {}
    everything = modules(severed or "mlp", range(lm.layers))
    base = run({m: lambda output, m=m: seen.update({m: output.clone()}) for m in everything})  # type: ignore[misc]
    grid = torch.empty(prompt, lm.layers, dtype=torch.float64)
    for token in range(prompt):
        for layer in range(lm.layers):
            if kind == "state":
                changes = {lm.block(layer): clean(token)}
                if severed:
                    for m in modules(severed, range(layer + 1, lm.layers)):
                        changes[m] = as_before(token, seen[m])
            else:
                low, high = max(0, layer - window // 2), layer - (-window // 2)
                restored = modules(kind, range(low, min(lm.layers, high)))
                changes = dict.fromkeys(restored, clean(token))
            grid[token, layer] = run(changes)[1:].mean()
    return float(base[0]), float(base[1:].mean()), grid
