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
from errata.lm.forward import run_until
from errata.lm.hooks import captured, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.noise import Hidden, hidden, subjects_hidden
from errata.lm.tokens import batches, encode_requests, pad
from errata.requests import Request

Averaging = Literal["mean", "half-bare", "bare"]
"""How a request's key is averaged over contexts. `mean`: all alike (ROME); `half-bare`: the bare
prompt weighs one half, the prefixed ones share the other (MEMIT); `bare`: the bare prompt alone."""

_ENOUGH_ROWS = 8
"""Requests from which on each context is a batch of its own, its prefix computed once."""


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


def subject_veils(
    lm: LanguageModel, requests: Sequence[Request], prefix: str = "", *, draw: int = 0
) -> list[Hidden | None]:
    """What hides the subjects in the rows of `subject_rows`; None where a variant hides nothing."""
    if not any(request.problem.hidden for request in requests):
        return [None] * len(requests)
    encoded = encode_requests(lm, requests, prefix=prefix, target=False)
    return hidden(lm, requests, encoded, draw=draw)


@torch.no_grad()
def at_subject(
    lm: LanguageModel,
    rows: Sequence[Sequence[Sequence[int]]],
    layer: int,
    *,
    batch_tokens: int,
    veils: Sequence[Sequence[Hidden | None]] | None = None,
) -> AtSubject:
    """Keys and values at `layer` of every row's last token, all contexts in one go.

    Args:
        lm: the model, as edited so far.
        rows: p contexts of n rows of token ids, each ending with the subject.
        layer: the block to look into.
        batch_tokens: at most so many tokens (padding included) are run at once.
        veils: what hides the subject in each row; by default nothing.

    Raises:
        NotFiniteError: a key or value is NaN or infinite.
    """
    # Rows of one context begin alike; a few rows are better run beside those of other contexts.
    veils = veils or [[None] * len(context) for context in rows]
    each = [_veiled(*pair) for pair in zip(rows, veils, strict=True)]
    flat = [row for part in each for row in part]
    found: dict[tuple[tuple[int, ...], Hidden | None], tuple[Tensor, Tensor]] = {}
    module = lm.mlp_out(layer)
    for part in [flat] if len(rows[0]) < _ENOUGH_ROWS else each:
        distinct = [row for row in dict.fromkeys(part) if row not in found]
        for group in batches([len(ids) for ids, _ in distinct], batch_tokens):
            some = [distinct[i] for i in group]
            behind = [veil for _, veil in some]
            with captured({0: module}, "both") as seen, subjects_hidden(lm, behind):
                ids = [ids for ids, _ in some]
                skipped = run_until(lm, ids, module, share=not any(behind))
            last = torch.tensor([len(row) - 1 - skipped for row, _ in some])
            index = torch.arange(len(some))
            keys, values = (at(states[0], index, last) for states in (seen.inputs, seen.outputs))
            found |= dict(zip(some, zip(keys, values, strict=True), strict=True))

    def arranged(which: int) -> Tensor:
        stacked = torch.stack([found[row][which] for row in flat]).double()
        return stacked.reshape(len(rows), len(rows[0]), -1).transpose(0, 1)

    result = AtSubject(arranged(0), arranged(1))
    if not (result.keys.isfinite().all() and result.values.isfinite().all()):
        raise NotFiniteError(
            f"block {layer} of {lm.name} gives NaN or infinite values at a subject; the model's "
            "weights are damaged, or its dtype is too narrow: load it in float32 or bfloat16."
        )
    return result


@torch.no_grad()
def stream_at_subject(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    layer: int,
    *,
    batch_tokens: int,
    veils: Sequence[Hidden | None] | None = None,
) -> Tensor:
    """(n, d_model) what block `layer` returns at each row's last token; float64."""
    veils = veils or [None] * len(rows)
    streams: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in batches([len(row) for row in rows], batch_tokens):
        batch = pad(lm, [rows[i] for i in group])
        last = torch.tensor([len(rows[i]) - 1 for i in group])
        with (
            captured({0: lm.block(layer)}, "output") as seen,
            subjects_hidden(lm, [veils[i] for i in group]),
            stopped_after(lm.block(layer)),
        ):
            lm.network(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        for i, stream in zip(
            group, at(seen.outputs[0], torch.arange(len(group)), last), strict=True
        ):
            streams[i] = stream
    return torch.stack(streams).double()


def _veiled(
    rows: Sequence[Sequence[int]], veils: Sequence[Hidden | None]
) -> list[tuple[tuple[int, ...], Hidden | None]]:
    return [(tuple(row), veil) for row, veil in zip(rows, veils, strict=True)]


def at(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """States at (row, column), whichever device they live on."""
    return states[rows.to(states.device), columns.to(states.device)]
