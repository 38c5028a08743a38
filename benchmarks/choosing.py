"""Choosing the layer to edit: saliency's one pass against causal tracing of the same facts.

Both answer the question of `--layers auto:...`, of as many facts as that looks at. The baseline is
our own tracing of MLP windows, not the reference code's, which takes several times as long again
(sections `tracing-mlps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.measure import Row, alternated, block_products, head_products, rate_of
from benchmarks.sections import Bench
from benchmarks.tracing import prompts
from errata.jobs.layers import SAMPLE, window_for
from errata.lm.loss import Example
from errata.lm.tokens import encode_answers
from errata.locate.saliency import saliency
from errata.locate.tracing import trace_all
from errata.requests import Request


def choosing(bench: Bench) -> Iterator[Row]:
    """Saliency of the MLPs, naive as SaLEM takes it, over restoring every window of MLPs."""
    lm = bench.setting.lm
    requests = [request for request, _ in prompts(lm, min(SAMPLE, max(bench.sizes)))]
    # What it says is traced, whatever it is: so every fact counts, known or not.
    requests = [Request(r.prompt, r.subject, r.target) for r in requests]
    examples = [Example(r.text, r.target) for r in requests]
    window = window_for(lm)
    slow, fast = alternated(
        partial(trace_all, lm, requests, kinds=("mlp",), window=window),
        partial(saliency, lm, examples, modules="mlp"),
        bench.device,
        bench.rounds,
    )
    rows = encode_answers(lm, [e.prompt for e in examples], [e.answer for e in examples])
    products = sum(len(row.ids) * block_products(lm, 0, lm.layers - 1) for row in rows)
    products += sum(len(row.answer) for row in rows) * head_products(lm)
    yield Row(
        section="choosing",
        model=bench.setting.name,
        what=f"{len(requests)} facts, {lm.layers} layers",
        seconds=fast.seconds,
        serial_seconds=slow.seconds,
        difference=None,  # they answer one question in two ways
        tolerance=None,
        peak=fast.peak,
        serial_peak=slow.peak,
        floor=3 * products / rate_of(bench.setting),  # forward, and backward for states and weights
        goal=bench.goal(20),
        note=f"saliency over tracing; {len(slow.value.traces)} of {len(requests)} facts traced",
    )


CHOOSING_SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {"choosing": choosing}
"""Name on the command line -> section."""
