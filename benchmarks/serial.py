"""The baseline: the same algorithms, one thing after another, as the references run them.

One request at a time with the whole model at every step and logits at every position; one pass
over the text per layer; a fresh d x d solve per batch; one case at a time. Numbers are those of
METHODS (19 updates, KL row, weight decay of the norm, MEMIT's half-bare keys). What is not
measured is shared with errata: token ids, hooks, module paths. Where the references are wasteful
beyond that (MEMIT's runs the head twice) the baseline is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from errata.editors.closed_form.targets import TargetConfig
from errata.lm.forward import frozen
from errata.lm.hooks import captured, rewritten_output, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.tokens import Batch, batches, encode, encode_answers, encode_requests, pad
from errata.lm.weights import weight_out_in
from errata.requests import Request


def target(
    lm: LanguageModel,
    request: Request,
    contexts: Sequence[str],
    layer: int,
    config: TargetConfig,
) -> Tensor:
    """MEMIT's z of one request (d_model,): block output at the subject plus the delta found."""
    rows = [encode_requests(lm, [request], prefix=prefix)[0] for prefix in contexts]
    identity = Request("{} is a", request.subject, request.target)
    last_row = encode_requests(lm, [identity], target=False)[0]
    batch = pad(lm, [*(row.ids[:-1] for row in rows), last_row.ids])
    index = torch.arange(len(rows) + 1, device=lm.device)
    subject = torch.tensor([*(r.subject_last for r in rows), last_row.subject_last]).to(lm.device)
    delta = torch.zeros(lm.d_model, device=lm.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.learning_rate)
    start: Tensor | None = None
    before: Tensor | None = None

    def shifted(hidden: Tensor) -> Tensor:
        nonlocal start
        if start is None:
            start = hidden[0, subject[0]].detach().float()
        hidden = hidden.clone()
        hidden[index, subject] += delta.to(hidden)
        return hidden

    with frozen(lm):  # as the references do: no gradients of weights
        for update in range(config.updates + 1):
            with rewritten_output(lm.block(layer), shifted):
                logits = _logits(lm, batch)
            assert start is not None
            log_p = logits.float().log_softmax(dim=2)
            nll = torch.stack(
                [
                    -log_p[i, row.prompt_length - 1 + j, token] / len(row.answer)
                    for i, row in enumerate(rows)
                    for j, token in enumerate(row.answer)
                ]
            ).sum() / len(rows)
            now = log_p[-1, subject[-1]]
            if before is None:
                before = now.detach()
            kl = (now.exp() * (now - before)).sum()
            loss = nll + config.kl * kl + config.decay * delta.norm() / start.norm() ** 2
            if update == config.updates or loss < config.stop_below:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            longest = config.clamp * start.norm()
            with torch.no_grad():
                if delta.norm() > longest:
                    delta.mul_(longest / delta.norm())
    assert start is not None
    return (start + delta.detach()).double()


@torch.no_grad()
def key(lm: LanguageModel, request: Request, contexts: Sequence[str], layer: int) -> Tensor:
    """MEMIT's key of one request (d_ff,): the bare prompt weighs one half, the others share one."""
    rows = [encode_requests(lm, [request], prefix=p, target=False)[0] for p in contexts]
    with captured({0: lm.mlp_out(layer)}) as seen:
        _logits(lm, pad(lm, [row.ids for row in rows]))
    keys = torch.stack([seen.inputs[0][i, row.subject_last] for i, row in enumerate(rows)]).double()
    return keys[0] if len(keys) == 1 else (keys[0] + keys[1:].mean(dim=0)) / 2


@torch.no_grad()
def stream(lm: LanguageModel, request: Request, layer: int) -> Tensor:
    """What the block returns at the subject of the bare prompt (d_model,)."""
    (row,) = encode_requests(lm, [request], target=False)
    with captured({0: lm.block(layer)}, "output") as seen:
        _logits(lm, pad(lm, [row.ids]))
    return seen.outputs[0][0, row.subject_last].double()


def solve(keys: Tensor, residuals: Tensor, moment: Tensor, weight: float) -> Tensor:
    """MEMIT's change R^T K (weight C + K^T K)^-1, (d_out, d_in), by LU of the d x d system."""
    system = weight * moment.double() + keys.mT @ keys
    solved: Tensor = torch.linalg.solve(system, keys.mT)
    return residuals.mT @ solved.mT


@torch.no_grad()
def spread_(
    lm: LanguageModel,
    requests: Sequence[Request],
    contexts: Sequence[str],
    layers: Sequence[int],
    targets: Tensor,
    moments: dict[int, Tensor],
    weight: float,
) -> dict[int, Tensor]:
    """MEMIT's changes of all layers, given z (n, d_model); they are left on the model's weights."""
    changes = {}
    for place, layer in enumerate(layers):
        keys = torch.stack([key(lm, request, contexts, layer) for request in requests])
        now = torch.stack([stream(lm, request, layers[-1]) for request in requests])
        residuals = (targets - now) / (len(layers) - place)
        changes[layer] = solve(keys, residuals, moments[layer].to(keys.device), weight)
        matrix = weight_out_in(lm.mlp_out(layer))
        matrix.copy_(matrix.double() + changes[layer])
    return changes


@torch.no_grad()
def moment(lm: LanguageModel, layer: int, texts: Sequence[str], batch_tokens: int) -> Tensor:
    """E[k k^T] of one layer (d_ff, d_ff): a pass of its own up to that layer, float32 sums."""
    total: Tensor | None = None
    count = 0
    for begin in range(0, len(texts), 100):
        rows = encode(lm, texts[begin : begin + 100])
        for group in batches([len(row) for row in rows], batch_tokens):
            batch = pad(lm, [rows[i] for i in group])
            module = lm.mlp_out(layer)
            with captured({0: module}) as seen, stopped_after(module):
                lm.network(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            x = seen.inputs[0][batch.mask.bool()].float()
            total = x.mT @ x if total is None else total + x.mT @ x
            count += len(x)
    assert total is not None
    return total / count


@torch.no_grad()
def probabilities(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Mean negative log-probability of each answer of one case, all in one padded batch."""
    rows = encode_answers(lm, [prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    log_p = _logits(lm, pad(lm, [row.ids for row in rows])).float().log_softmax(dim=2)
    nlls = []
    for i, row in enumerate(rows):
        places = range(row.prompt_length - 1, len(row.ids) - 1)
        found = [log_p[i, place, row.ids[place + 1]].item() for place in places]
        nlls.append(-sum(found) / len(found))
    return nlls


@torch.no_grad()
def write(lm: LanguageModel, prompts: Sequence[str], total_tokens: int) -> list[list[int]]:
    """Token ids of the likeliest continuations of one case's prompts, column by column, cached."""
    rows = encode(lm, prompts)
    length = max(total_tokens, *map(len, rows))
    ids = torch.full((len(rows), length), lm.pad_id, device=lm.device)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows], device=lm.device)
    cache = DynamicCache()
    begin, end = 0, int(lengths.min())
    while end < length:
        out = lm.network(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
        ids[:, end] = torch.where(end < lengths, ids[:, end], out.logits[:, -1].argmax(dim=1))
        begin, end = end, end + 1
    return [ids[i, len(row) :].tolist() for i, row in enumerate(rows)]


def _logits(lm: LanguageModel, batch: Batch) -> Tensor:
    logits = lm.network(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits
