"""What large models cost on many GPUs, reckoned from what this machine does with a small one.

Multiplications are counted from shapes, for the small model and for the large one (which is never
built: its weights have shapes but no numbers). The small one is run, which says what share of this
processor's rate of plain matrix products each kind of work reaches; a GPU is taken to reach the
same share of its own peak. So the figures are estimates; nothing here is measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil

import torch

from benchmarks.measure import block_products, measured, rate_of
from benchmarks.sections import (
    Bench,
    key_products,
    moment_products,
    our_keys,
    our_targets,
    score_products,
    target_products,
)
from benchmarks.settings import Setting
from errata.editors.closed_form.statistics import collect
from errata.lm.tokens import encode, encode_requests
from errata.lm.weights import weight_out_in
from errata.measure.score import score
from errata.requests import Case, Request

LARGE = "random-llama-7b"
GPUS = 1, 8, 64

PEAK = 989e12
"""Operations a second of one GPU in bfloat16, dense: NVIDIA's data sheet of the H100 SXM."""
PEAK_DOUBLE = 67e12
"""In float64, from the same sheet; the solves are in float64."""
LOADING = 2e9
"""Bytes of weights that a worker reads in a second."""
SENDING = 1e9
"""Bytes of results that the one process at the centre receives in a second."""
EDITS = 10_000
UNIT = 100
"""Edits of one unit of the study."""
DOCUMENTS = 100_000
DOCUMENT_TOKENS = 500

ASSUMED = f"""\
- A GPU does {PEAK / 1e12:.0f} TFLOP/s in bfloat16 and {PEAK_DOUBLE / 1e12:.0f} in float64 (data \
sheet of the H100 SXM) and reaches the shares of it that the first table tells.
- A multiplication and its addition are 2 FLOP. Left out: attention's own products, padding, and \
what moves numbers only (applying an edit, undoing it, hashing weights).
- The study: {EDITS:,} facts, each edited alone by MEMIT with 6 contexts and 20 steps, none ended \
early, and its case scored before and after; units of {UNIT} edits, of which a GPU does a whole \
number.
- The moments: {DOCUMENTS:,} documents of {DOCUMENT_TOKENS} tokens, up to the last edited block.
- A worker reads its weights at {LOADING / 1e9:g} GB/s before it begins; results come in at \
{SENDING / 1e9:g} GB/s, one after another."""


def markdown(bench: Bench) -> Iterator[str]:
    """Both tables and all that they assume."""
    small, large = bench.setting, Setting.of(LARGE, "meta", torch.bfloat16)
    shares = {}
    yield f"| on {small.name}, 1 thread | multiplications | seconds | share of peak |"
    yield "|---|---:|---:|---:|"
    for what, products, do in sample(bench):
        do()  # the first run of anything is slower
        seconds = min(measured(do, bench.device).seconds for _ in range(bench.rounds))
        shares[what] = products / seconds / rate_of(small)
        yield f"| {what} | {products:.3g} | {seconds:.3g} | {shares[what]:.0%} |"
    yield ""
    yield ASSUMED
    yield ""
    yield f"| on {LARGE} | count | FLOP each | " + " | ".join(f"{n} GPU" for n in GPUS) + " |"
    yield "|---|---:|---:|" + "---:|" * len(GPUS)
    edits = {what: 2 * products for what, products in per_edit(large, bench.cases).items()}
    solve = 2 * double_products(large)
    each = sum(flop / shares[what] for what, flop in edits.items()) / PEAK + solve / PEAK_DOUBLE
    for what, flop in edits.items():
        seconds = EDITS * flop / shares[what] / PEAK
        yield _line(what, EDITS, flop, [seconds / n for n in GPUS])
    yield _line("solves, in float64", EDITS, solve, [EDITS * solve / PEAK_DOUBLE / n for n in GPUS])
    nbytes = sum(weight.nbytes for weight in large.lm.network.parameters())
    units = ceil(EDITS / UNIT)
    whole = [nbytes / LOADING + ceil(units / n) * UNIT * each for n in GPUS]
    yield _line("**the study**, weights read, whole units", units, UNIT * each * PEAK, whole)
    token = 2 * moment_products(large)
    tokens = DOCUMENTS * DOCUMENT_TOKENS
    read = [tokens * token / shares["moments"] / PEAK / n for n in GPUS]
    yield _line("tokens read", tokens, token, read)
    width = weight_out_in(large.lm.mlp_out(large.layer)).shape[1]
    sums = 8 * width**2 * len(large.shape.moment_layers)
    sent = [n * sums / SENDING for n in GPUS]
    yield _line(f"sums sent, {sums / 1e9:.1f} GB from each", 1, 0, sent)
    total = [nbytes / LOADING + a + b for a, b in zip(read, sent, strict=True)]
    yield _line("**the moments**, weights read", DOCUMENTS, DOCUMENT_TOKENS * token, total)


def _line(what: str, count: int, flop: float, seconds: Sequence[float]) -> str:
    told = f"{flop:.2g}" if flop else "-"
    return f"| {what} | {count:,} | {told} | " + " | ".join(map(_time, seconds)) + " |"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def sample(bench: Bench) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Each kind of work on the small model: name, multiplications, and how to do it."""
    s, requests = bench.setting, bench.setting.requests[: max(bench.sizes)]
    cases, texts = s.cases[: bench.cases], s.texts(bench.moment_tokens)
    tokens = sum(map(len, encode(s.lm, texts)))
    yield "targets", target_products(s, requests), partial(our_targets, s, requests)
    yield "keys", key_products(s, requests), partial(our_keys, s, requests)
    probability = partial(score, s.lm, cases, protocols=["probability"])
    yield "scoring", score_products(s, cases), probability
    layers = s.shape.moment_layers
    yield (
        "moments",
        tokens * moment_products(s),
        partial(collect, s.lm, layers, texts, tokens=tokens),
    )


def per_edit(s: Setting, count: int) -> dict[str, float]:
    """Multiplications for one fact that is edited alone: the mean of some."""
    requests, cases = s.requests[:count], s.cases[:count]
    return {
        "targets": _mean(requests, lambda one: target_products(s, [one])),
        "keys": _mean(requests, lambda one: _key_products(s, one)),
        "scoring": 2 * _mean(cases, lambda one: score_products(s, [one])),
    }


def _mean(things: Sequence[Case] | Sequence[Request], of: Callable[..., int]) -> float:
    return sum(map(of, things)) / len(things)


def _key_products(s: Setting, request: Request) -> int:
    """Keys at every edited layer, and the stream at the last one before each of them."""
    (row,) = encode_requests(s.lm, [request], target=False)
    stream = (row.subject_last + 1) * block_products(s.lm, 0, s.layer)
    return sum(key_products(s, [request], layer) + stream for layer in s.shape.layers)


def double_products(s: Setting) -> int:
    """Multiplications of one fact's solves, the factors being known."""
    d_out, d_in = weight_out_in(s.lm.mlp_out(s.layer)).shape
    return len(s.shape.layers) * (2 * d_in**2 + d_in * d_out)
