"""What a GPU is for: edits a second of a large model, and its memory.

There is no serial version of a thousand edits to wait for: one request's serial time is measured
and scaled. Differences are not told in bfloat16, where both sides round; the CPU table tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import serial
from benchmarks.measure import Row, block_products, each_within, measured, rate, rate_of
from benchmarks.sections import Bench, editor, key_products, target_products
from errata.editors import Background
from errata.editors.closed_form.statistics import collect
from errata.lm.tokens import encode
from errata.lm.weights import weight_out_in


def edits(bench: Bench) -> Iterator[Row]:
    """MEMIT edits of several sizes, the factors of the moments being known."""
    s = bench.setting
    layers = s.shape.layers
    moments = s.moments()
    for layer in layers:
        moments.factor(layer)
    write = editor(s, Background(given=moments))
    write.edit(s.lm, s.requests[:1])  # the first run of anything is slower
    requests = s.requests[:3]
    one = [partial(serial.target, s.lm, r, s.contexts, s.layer, s.target) for r in requests]
    one_by_one = each_within(one, bench.serial_seconds, bench.device)
    slow = one_by_one.seconds / len(one_by_one.value)
    d_out, d_in = weight_out_in(s.lm.mlp_out(s.layer)).shape
    for n in bench.sizes:
        asked = s.requests[:n]
        run = measured(partial(write.edit, s.lm, asked), bench.device)
        products = target_products(s, asked) + len(layers) * key_products(s, asked)
        wide = len(layers) * (d_in**2 * n + d_in * n**2 + d_in * d_out * n)
        floor = products / rate_of(s) + wide / rate(bench.device, torch.float64, min(d_in, 2048))
        yield Row(
            "edits",
            s.name,
            f"{n} requests, {len(layers)} layers",
            run.seconds,
            n * slow,
            None,
            None,
            run.peak,
            one_by_one.peak,
            floor,
            note=f"{n / run.seconds:.2f} edits/s; serial: targets alone, {len(requests)} scaled",
        )


def second_moments(bench: Bench) -> Iterator[Row]:
    """Second moments of five layers in one pass; serial: the last layer alone, scaled by depth."""
    s = bench.setting
    layers, texts = s.shape.moment_layers, s.texts(bench.moment_tokens)
    tokens = sum(map(len, encode(s.lm, texts)))
    run = measured(lambda: collect(s.lm, layers, texts, tokens=tokens).layers, bench.device)
    cap = 3 * min(s.lm.max_length, 4096)
    slow = measured(lambda: serial.moment(s.lm, layers[-1], texts, cap).shape[0], bench.device)
    width = slow.value
    forward = block_products(s.lm, 0, layers[-1]) - width * s.lm.d_model
    yield Row(
        "second-moments",
        s.name,
        f"{len(layers)} layers, {tokens:,} tokens",
        run.seconds,
        slow.seconds * sum(layer + 1 for layer in layers) / (layers[-1] + 1),
        None,
        None,
        run.peak,
        slow.peak,
        tokens * (forward + len(layers) * width**2 // 2) / rate_of(s),
        note=f"{tokens / run.seconds:,.0f} tokens/s; serial: the last layer, scaled by depth",
    )


GPU_SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "edits": edits,
    "second-moments": second_moments,
}
"""Name on the command line -> section."""
