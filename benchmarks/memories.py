"""What a memory beside the weights costs when a model writes: with it against without it.

Here the baseline, "serial", is the unedited model, so that the ratio is the share of its speed that
is left. Entries are drawn at random, and answer to nothing that is asked: a pass pays for asking.
"Edits" are made one after another on the model with those before, as a stream makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.measure import Row, measured
from benchmarks.sections import Bench
from errata.editors import EDITORS, Background
from errata.edits.edit import Edit, Record
from errata.edits.memory import MemoryEdit
from errata.edits.stack import Stack
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode
from errata.lm.weights import weight_out_in
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.requests import Request

HELD = (100, 1_000, 10_000)
ROWS = 8
NEW_TOKENS = 32
STREAM = 16
RANK = 8


def codebook(bench: Bench) -> Iterator[Row]:
    """GRACE."""
    yield from _rows(bench, "grace", "codebook", {"replace": "last"})


def experts(bench: Bench) -> Iterator[Row]:
    """SCEN."""
    yield from _rows(bench, "scen", "experts", {"threshold": 0.65})


MEMORY_SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "memory-grace": codebook,
    "memory-scen": experts,
}
"""Name on the command line -> section."""


def facts() -> list[Request]:
    """Facts, in prompts of whatever length."""
    book, random = Encyclopedia.load(), stable_random("memories")
    return [
        Request(book.relations[fact.relation].templates[0], fact.subject, fact.object)
        for fact in random.sample(book.facts, len(book.facts))
    ]


def alike(lm: LanguageModel, requests: list[Request]) -> list[str]:
    """Prompts of one length, the most frequent one."""
    texts = [request.text for request in requests]
    lengths = [len(row) for row in encode(lm, texts)]
    usual = max(set(lengths), key=lengths.count)
    return [text for text, length in zip(texts, lengths, strict=True) if length == usual][:ROWS]


def held(lm: LanguageModel, kind: str, settings: dict[str, object], count: int) -> MemoryEdit:
    """So many entries in one edit, none of which answers to anything."""
    path = lm.mlp_out_path(lm.layers * 5 // 8)
    d_out, d_in = weight_out_in(lm.module(path)).shape
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    if kind == "codebook":
        tensors = {"keys": some(d_in), "values": some(d_out), "radii": torch.full((count,), 1e-3)}
    else:
        small = torch.zeros(1).expand(count, 1, d_in)  # prompts and factors are never looked at
        tensors = {
            "neurons": some(d_in) * 1e-3,
            "left": torch.zeros(1).expand(count, d_out, RANK),
            "right": torch.zeros(1).expand(count, RANK, d_in),
            "prompts": small,
        }
    requests = [Request("Fact {}", str(i), "true") for i in range(count)]
    record = Record.of(lm, method="random")
    return MemoryEdit.of(
        lm, kind, path, tensors, requests=requests, record=record, settings=settings
    )


def _rows(bench: Bench, method: str, kind: str, settings: dict[str, object]) -> Iterator[Row]:
    lm = bench.setting.lm
    requests = facts()
    prompts = alike(lm, requests)
    each, size = stream(bench, method, requests[:STREAM])
    write = partial(complete, lm, prompts, new_tokens=NEW_TOKENS)
    write()  # the first run of anything is slower
    for count in HELD:
        edit = held(lm, kind, settings, count)
        with edit.applied(lm):
            said = write()  # merged here, once
        plain, beside = math.inf, math.inf
        for _ in range(bench.rounds):
            base = measured(write, bench.device)
            with edit.applied(lm):
                write()
                now = measured(write, bench.device)
            assert said == now.value == base.value
            plain, beside = min(plain, base.seconds), min(beside, now.seconds)
        yield Row(
            section=f"memory-{method}",
            model=bench.setting.name,
            what=f"{count:,} edits held, {len(prompts)} texts of {NEW_TOKENS} tokens",
            seconds=beside,
            serial_seconds=plain,
            difference=0.0,
            tolerance=bench.tolerance,
            peak=now.peak,
            serial_peak=base.peak,
            floor=plain,
            goal=bench.goal(1 / 1.1) if count == 1_000 else None,
            note=f"an edit takes {each:.2f} s and {size:,} bytes",
        )


def stream(bench: Bench, method: str, requests: list[Request]) -> tuple[float, int]:
    """Seconds and bytes of an edit, made one after another on the model with those before."""
    lm, entry = bench.setting.lm, EDITORS[method]
    editor = entry.editor(entry.config(), Background())
    edits: list[Edit] = []

    def run() -> None:
        for request in requests:
            edit = editor.edit(lm, [request])
            edit.apply_(lm)
            edits.append(edit)

    try:
        spent = measured(run, bench.device)
    finally:
        Stack(edits).undo_(lm)
    return spent.seconds / len(requests), sum(edit.nbytes for edit in edits) // len(edits)
