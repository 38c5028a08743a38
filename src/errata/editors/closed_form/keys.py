"""Keys, values and streams at the subject: what the closed-form methods read off the model.

The key of a request is the input of the last MLP matrix at the subject's last token; the value
is that matrix' output there; the stream is the block's output there. Tokens after the subject
cannot be seen from it, so rows are cut at the subject, and the pass ends at the layer asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.errors import NotFiniteError
from errata.lm.hooks import captured, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.tokens import batches, encode_requests, pad
from errata.requests import Request

Averaging = Literal["mean", "half-bare", "bare"]
"""How a request's key is averaged over contexts. `mean`: all alike (ROME); `half-bare`: the bare
prompt weighs one half, the prefixed ones share the other (MEMIT); `bare`: the bare prompt alone."""


@dataclass(frozen=True)
class AtSubject:
    """What stands at the subjects' last tokens of n requests in p contexts; context 0 is bare."""

    keys: Tensor
    """(n, p, d_ff) inputs of the last MLP matrix."""
    values: Tensor
    """(n, p, d_model) outputs of the last MLP matrix."""


def context_weights(averaging: Averaging, contexts: int) -> Tensor:
    """(p,) weights over the contexts that sum to one; the bare prompt comes first."""
    weights = torch.zeros(contexts, dtype=torch.float64)
    if averaging == "mean":
        weights[:] = 1 / contexts
    elif averaging == "bare" or contexts == 1:
        weights[0] = 1
    else:
        weights[0], weights[1:] = 0.5, 0.5 / (contexts - 1)
    return weights


def subject_rows(
    lm: LanguageModel, requests: Sequence[Request], prefix: str = ""
) -> list[tuple[int, ...]]:
    """Each request's token ids up to the subject's last token: equal rows have equal keys."""
    encoded = encode_requests(lm, requests, prefix=prefix, target=False)
    return [tuple(row.ids[: row.subject_last + 1]) for row in encoded]


@torch.no_grad()
def at_subject(
    lm: LanguageModel, rows: Sequence[Sequence[Sequence[int]]], layer: int, *, batch_tokens: int
) -> AtSubject:
    """Keys and values at `layer` of every row's last token, all contexts in one go.

    Args:
        lm: the model, as edited so far.
        rows: p contexts of n rows of token ids, each ending with the subject.
        layer: the block to look into.
        batch_tokens: at most so many tokens (padding included) are run at once.

    Raises:
        NotFiniteError: a key or value is NaN or infinite.
    """
    flat = [row for context in rows for row in context]
    distinct = list(dict.fromkeys(tuple(row) for row in flat))
    keys: list[Tensor] = [torch.empty(0)] * len(distinct)
    values: list[Tensor] = [torch.empty(0)] * len(distinct)
    module = lm.mlp_out(layer)
    for group in batches([len(row) for row in distinct], batch_tokens):
        batch = pad(lm, [distinct[i] for i in group])
        last = torch.tensor([len(distinct[i]) - 1 for i in group])
        with captured({0: module}, "both") as seen, stopped_after(module):
            lm.network(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        index = torch.arange(len(group))
        for i, key, value in zip(
            group, at(seen.inputs[0], index, last), at(seen.outputs[0], index, last), strict=True
        ):
            keys[i], values[i] = key, value
    place = {row: i for i, row in enumerate(distinct)}
    order = [place[tuple(row)] for row in flat]

    def arranged(tensors: list[Tensor]) -> Tensor:
        stacked = torch.stack([tensors[i] for i in order]).double()
        return stacked.unflatten(0, (len(rows), len(rows[0]))).transpose(0, 1)

    result = AtSubject(arranged(keys), arranged(values))
    if not (result.keys.isfinite().all() and result.values.isfinite().all()):
        raise NotFiniteError(
            f"block {layer} of {lm.name} gives NaN or infinite values at a subject; the model's weights "
            "are damaged, or its dtype is too narrow: load it in float32 or bfloat16."
        )
    return result


@torch.no_grad()
def stream_at_subject(
    lm: LanguageModel, rows: Sequence[Sequence[int]], layer: int, *, batch_tokens: int
) -> Tensor:
    """(n, d_model) what block `layer` returns at each row's last token; float64."""
    streams: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in batches([len(row) for row in rows], batch_tokens):
        batch = pad(lm, [rows[i] for i in group])
        last = torch.tensor([len(rows[i]) - 1 for i in group])
        with captured({0: lm.block(layer)}, "output") as seen, stopped_after(lm.block(layer)):
            lm.network(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        for i, stream in zip(
            group, at(seen.outputs[0], torch.arange(len(group)), last), strict=True
        ):
            streams[i] = stream
    return torch.stack(streams).double()


def at(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """States at (row, column), whichever device they live on."""
    return states[rows.to(states.device), columns.to(states.device)]
