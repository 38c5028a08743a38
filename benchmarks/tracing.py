"""Causal tracing against one forward pass for each place restored.

The baseline is the reference code's way: for each token and layer a full pass of the clean row and
the corrupted ones, with logits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import (
    Row,
    block_products,
    each_within,
    head_products,
    measured,
    off,
    rate_of,
)
from benchmarks.sections import Bench
from errata.lm.hooks import rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.tokens import Encoded, encode_requests
from errata.lm.weights import weight_out_in
from errata.locate.restoration import around
from errata.locate.tracing import Kind, Noise, trace
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.requests import Request

WINDOW = 10
LENGTHS = range(12, 21)
"""Tokens of the prompts traced."""
PROMPTS = 2


def states(bench: Bench) -> Iterator[Row]:
    """Restoring every state."""
    yield from _rows(bench, "state")


def mlps(bench: Bench) -> Iterator[Row]:
    """Restoring every window of MLPs."""
    yield from _rows(bench, "mlp")


TRACING_SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "tracing-states": states,
    "tracing-mlps": mlps,
}
"""Name on the command line -> section."""


def prompts(lm: LanguageModel, count: int) -> list[tuple[Request, Encoded]]:
    """Facts in prompts of as many tokens as those of papers, subjects wherever they stand."""
    book, random = Encyclopedia.load(), stable_random("tracing")
    found = []
    for fact in random.sample(book.facts, len(book.facts)):
        template = random.choice(book.relations[fact.relation].templates)
        request = Request(template, fact.subject, fact.object)
        (row,) = encode_requests(lm, [request], target=False)
        if row.prompt_length in LENGTHS:
            found.append((request, row))
        if len(found) == count:
            break
    return found


def _rows(bench: Bench, kind: Kind) -> Iterator[Row]:
    lm = bench.setting.lm
    for request, row in prompts(lm, PROMPTS):
        ours = partial(trace, lm, request, kind=kind, window=WINDOW)
        level = ours().level  # the first run of anything is slower
        fast = min(
            (measured(ours, bench.device) for _ in range(bench.rounds)), key=lambda run: run.seconds
        )
        noise = torch.from_numpy(level * Noise().draw(*_noise_shape(lm, row)))
        places = [(t, layer) for t in range(len(row.ids)) for layer in range(lm.layers)]
        stable_random(request.text).shuffle(places)
        one = [partial(one_place, lm, row, noise, kind, *place) for place in places]
        slow = each_within(one, bench.serial_seconds / PROMPTS, bench.device)
        k = len(slow.value)
        found = torch.tensor([fast.value.probabilities[t][layer] for t, layer in places[:k]])
        scaled = "" if k == len(places) else f"; serial: {k} places, scaled"
        yield Row(
            section="tracing-states" if kind == "state" else "tracing-mlps",
            model=bench.setting.name,
            what=f"{len(row.ids)} tokens, subject {row.subject_first} to {row.subject_last}",
            seconds=fast.seconds,
            serial_seconds=slow.seconds * len(places) / k,
            difference=off(found[:, None], torch.tensor(slow.value)[:, None]),
            tolerance=bench.tolerance,
            peak=fast.peak,
            serial_peak=slow.peak,
            floor=_products(lm, row, kind) / rate_of(bench.setting),
            goal=bench.goal(5) if kind == "state" else None,
            note=f"{Noise().samples} samples{scaled}",
        )


@torch.no_grad()
def one_place(
    lm: LanguageModel, row: Encoded, noise: Tensor, kind: Kind, token: int, layer: int
) -> float:
    """The likeliest next token's probability with one state, or window of MLPs, restored."""
    hidden = slice(row.subject_first, row.subject_last + 1)

    def corrupted(embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        embedded[1:, hidden] += noise.to(embedded)
        return embedded

    def restored(output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, token] = output[0, token]
        return output

    if kind == "state":
        modules = [lm.block(layer)]
    else:
        modules = [lm.mlp(k) for k in around(layer, WINDOW, lm.layers)]
    ids = torch.tensor([row.ids] * (1 + len(noise)), device=lm.device)
    with ExitStack() as stack:
        stack.enter_context(rewritten_output(lm.embedding, corrupted))
        for module in modules:
            stack.enter_context(rewritten_output(module, restored))
        logits = lm.network(input_ids=ids, use_cache=False).logits
    chances = logits[:, -1].float().softmax(dim=1)
    return float(chances[1:, chances[0].argmax()].double().mean())


def _noise_shape(lm: LanguageModel, row: Encoded) -> tuple[int, int]:
    return row.subject_last + 1 - row.subject_first, weight_out_in(lm.embedding).shape[1]


def _products(lm: LanguageModel, row: Encoded, kind: Kind) -> int:
    """Multiplications for tokens from the restored one on, in the layers above, and the head.

    The last block's MLP is needed at the prompt's last token alone.
    """
    samples, length, layers = Noise().samples, len(row.ids), lm.layers
    top = sum(weight.numel() for weight in lm.mlp(-1).parameters() if weight.ndim == 2)
    total = (1 + samples) * length * block_products(lm, 0, layers - 1)
    for layer in range(layers):
        first = layer + 1 if kind == "state" else around(layer, WINDOW, layers).start
        for token in range(row.subject_first, length):
            if first < layers or token == length - 1:
                left = length - token
                above = left * block_products(lm, first, layers - 1)
                saved = (left - 1) * top if first < layers else 0
                total += samples * (above - saved + head_products(lm))
    return total
