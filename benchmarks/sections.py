"""What is compared: one function for each section of the table.

Floors count the multiplications that our way does, from shapes and without padding; attention's
own products, which are small at these lengths, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks import serial
from benchmarks.measure import (
    Measured,
    Row,
    alternated,
    block_products,
    each_within,
    head_products,
    measured,
    off,
    rate,
    rate_of,
)
from benchmarks.settings import RELAXATION, Setting
from errata.algebra.memorize import memorize
from errata.editors import Background
from errata.editors.closed_form.keys import at_subject, context_weights, subject_rows
from errata.editors.closed_form.memit import Memit, MemitConfig
from errata.editors.closed_form.statistics import collect
from errata.editors.closed_form.targets import Targets, optimise_targets
from errata.edits.weights import WeightEdit
from errata.lm.generate import complete
from errata.lm.tokens import encode, encode_answers, encode_requests
from errata.lm.weights import weight_out_in
from errata.measure.score import questions, score
from errata.requests import Case, Request

BATCH_TOKENS = 16384
POCKET = ("pocket", "random-pocket")


@dataclass
class Bench:
    """A setting, how much of it to measure, and what later sections need of earlier ones."""

    setting: Setting
    sizes: tuple[int, ...] = (16, 100)
    """Numbers of requests."""
    serial_seconds: float = 240.0
    """Serial targets are measured on as many requests as fit, then scaled: they are linear."""
    moment_tokens: int = 20_000
    cases: int = 16
    rounds: int = 3
    found: dict[int, Targets] = field(default_factory=dict, repr=False)
    """Our targets by number of requests, so that no section finds them again to no end."""
    _targets: Measured[list[Tensor]] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.setting.lm.device

    @property
    def tolerance(self) -> float:
        """Results agree to this in the model's dtype."""
        return 1e-4 if self.setting.lm.dtype == torch.float32 else 5e-2

    def serial_targets(self) -> Measured[list[Tensor]]:
        """Block outputs z of as many requests as fit into the time, each found by itself."""
        s = self.setting
        if self._targets is None:
            wanted = s.requests[: max(self.sizes)]
            one = [partial(serial.target, s.lm, r, s.contexts, s.layer, s.target) for r in wanted]
            self._targets = each_within(one, self.serial_seconds, self.device)
        return self._targets

    def goal(self, small: float, pocket: float | None = None) -> float | None:
        """The issue's ratio for this model; it names none for others."""
        goals = {"random-gpt2-small": small} | dict.fromkeys(POCKET, pocket or small)
        return goals.get(self.setting.name)


def targets(bench: Bench) -> Iterator[Row]:
    """Block outputs z of all requests: 19 updates, 6 contexts and the KL row."""
    s = bench.setting
    our_targets(s, s.requests[:1])  # the first run of anything is slower
    one_by_one = bench.serial_targets()
    for n in bench.sizes:
        requests = s.requests[:n]
        run = measured(partial(our_targets, s, requests), bench.device)
        k = len(one_by_one.value)
        bench.found[n] = run.value
        found = run.value.streams + run.value.deltas
        difference = off(found[:k], torch.stack(one_by_one.value[:n]))
        yield Row(
            "targets",
            s.name,
            f"{n} requests",
            run.seconds,
            one_by_one.seconds * n / k,
            difference,
            bench.tolerance,
            run.peak,
            one_by_one.peak,
            target_products(s, requests) / rate_of(s),
            bench.goal(10, 7),
            _scaled(k, n),
        )


def keys(bench: Bench) -> Iterator[Row]:
    """Keys of all requests in 6 contexts at the edited layer."""
    s = bench.setting
    for n in bench.sizes:
        requests = s.requests[:n]
        slow, fast = alternated(
            lambda rs=requests: torch.stack([serial.key(s.lm, r, s.contexts, s.layer) for r in rs]),  # type: ignore[misc]
            partial(our_keys, s, requests),
            bench.device,
            bench.rounds,
        )
        products = key_products(s, requests)
        yield _row(bench, "keys", f"{n} requests", slow, fast, products, bench.goal(5))


def memit(bench: Bench) -> Iterator[Row]:
    """A whole edit: targets, then keys, streams and a solve for each layer."""
    s = bench.setting
    n, layers = max(bench.sizes), s.shape.layers
    requests = s.requests[:n]
    fast = measured(partial(our_edit, s, requests), bench.device)
    one_by_one = bench.serial_targets()
    k = len(one_by_one.value)
    z = torch.stack(one_by_one.value)
    if k < n:
        rest = bench.found.get(n) or our_targets(s, requests)
        z = torch.cat([z, (rest.streams + rest.deltas)[k:]])
    means = {layer: s.moments().mean(layer) for layer in layers}
    originals = {layer: weight_out_in(s.lm.mlp_out(layer)).clone() for layer in layers}
    try:
        spread = measured(
            lambda: serial.spread_(s.lm, requests, s.contexts, layers, z, means, RELAXATION),
            bench.device,
        )
    finally:
        for layer, weight in originals.items():
            weight_out_in(s.lm.mlp_out(layer)).copy_(weight)
    changes = {layer: fast.value.changes[s.lm.mlp_out_path(layer)].dense() for layer in layers}
    peaks = [one_by_one.peak, spread.peak]
    bare = sum(row.subject_last + 1 for row in encode_requests(s.lm, requests, target=False))
    d_out, d_in = weight_out_in(s.lm.mlp_out(s.layer)).shape
    products = target_products(s, requests) + len(layers) * bare * block_products(s.lm, 0, s.layer)
    products += sum(key_products(s, requests, layer) for layer in layers)
    wide = d_in**3 // 6 + d_in**2 * n + d_in * n**2 + d_in * d_out * n
    yield Row(
        "memit",
        s.name,
        f"{n} requests, {len(layers)} layers",
        fast.seconds,
        one_by_one.seconds * n / k + spread.seconds,
        max(off(changes[layer], spread.value[layer]) for layer in layers),
        bench.tolerance,
        fast.peak,
        None if None in peaks else max(p for p in peaks if p is not None),
        products / rate_of(s) + len(layers) * wide / rate(bench.device, torch.float64, d_in),
        bench.goal(8, 6),
        _scaled(k, n),
    )


def moments(bench: Bench) -> Iterator[Row]:
    """Second moments of five layers."""
    s = bench.setting
    layers, texts = s.shape.moment_layers, s.texts(bench.moment_tokens)
    tokens = sum(map(len, encode(s.lm, texts)))
    cap = 3 * min(s.lm.max_length, 4096)
    slow, fast = alternated(
        lambda: torch.stack([serial.moment(s.lm, layer, texts, cap).cpu() for layer in layers]),
        lambda: torch.stack([*collect(s.lm, layers, texts, tokens=tokens).means.values()]),
        bench.device,
        1,
    )
    products = tokens * moment_products(s)
    what = f"{len(layers)} layers, {tokens:,} tokens"
    yield _row(bench, "moments", what, slow, fast, products, bench.goal(4))


def solve(bench: Bench) -> Iterator[Row]:
    """One layer's change for a batch of random keys, with the factor known."""
    s = bench.setting
    moments_, layer = s.moments(), s.layer
    factor = moments_.factor(layer)
    mean = moments_.mean(layer)
    generator = torch.Generator(bench.device).manual_seed(0)
    for n in bench.sizes:
        options = {"generator": generator, "dtype": torch.float64, "device": bench.device}
        k = torch.randn(n, factor.dim, **options)  # type: ignore[call-overload]
        r = torch.randn(n, s.lm.d_model, **options)  # type: ignore[call-overload]
        slow, fast = alternated(
            lambda k=k, r=r: serial.solve(k, r, mean, RELAXATION)[None],  # type: ignore[misc]
            lambda k=k, r=r: memorize(k, r, factor, relaxation=RELAXATION).dense()[None],  # type: ignore[misc]
            bench.device,
            bench.rounds,
        )
        d = factor.dim
        products = d * d * n + 2 * d * n * n + d * s.lm.d_model * n
        row = _row(bench, "solve", f"{n} keys of {d}", slow, fast, 0, bench.goal(8))
        floor = products / rate(bench.device, torch.float64, min(d, 2048))
        yield Row(**(vars(row) | {"tolerance": 1e-10, "floor": floor}))


def scoring(bench: Bench) -> Iterator[Row]:
    """Probabilities of all answers of CounterFact cases."""
    s = bench.setting
    cases = s.cases[: bench.cases]
    pairs = [answers_of(case) for case in cases]

    def ours() -> Tensor:
        rows = score(s.lm, cases, protocols=["probability"]).rows
        nlls = [
            nll
            for row, case in zip(rows, cases, strict=True)
            for group in questions(case)
            for found in row[group]
            for nll in (found["nll"], found.get("rival_nll"))
            if nll is not None
        ]
        return torch.tensor(nlls)[None]

    def one_by_one() -> Tensor:
        return torch.tensor([[n for case in pairs for n in serial.probabilities(s.lm, case)]])

    slow, fast = alternated(
        one_by_one,
        ours,
        bench.device,
        min(2, bench.rounds),
    )
    what = f"{len(cases)} cases, {sum(map(len, pairs))} answers"
    products = score_products(s, cases)
    yield _row(bench, "scoring", what, slow, fast, products, bench.goal(5, 3))


def generation(bench: Bench) -> Iterator[Row]:
    """Greedy texts of up to 100 tokens, prompt included, after 10 prompts a case."""
    s = bench.setting
    cases = s.cases[: bench.cases]
    prompts = [prompt for case in cases for prompt in case.generation]
    total = min(100, s.lm.max_length)
    end = s.lm.tokenizer.eos_token_id

    def one_by_one() -> list[str]:
        rows = [row for case in cases for row in serial.write(s.lm, case.generation, total)]
        cut = [row[: row.index(end)] if end in row else row for row in rows]
        return [str(s.lm.tokenizer.decode(row, skip_special_tokens=True)) for row in cut]

    slow, fast = alternated(
        one_by_one,
        lambda: complete(s.lm, prompts, new_tokens=total, total_tokens=True),
        bench.device,
        1,
    )
    equal = sum(a == b for a, b in zip(slow.value, fast.value, strict=True))
    weights = block_products(s.lm, 0, s.lm.layers - 1) + head_products(s.lm)
    row = Row(
        "generation",
        s.name,
        f"{len(cases)} cases, {len(prompts)} texts",
        fast.seconds,
        slow.seconds,
        1 - equal / len(prompts),
        0.02,  # near-ties fall either way
        fast.peak,
        slow.peak,
        len(prompts) * total * weights / rate_of(s),
        bench.goal(2),
        f"{equal} of {len(prompts)} texts are equal",
    )
    yield row


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "targets": targets,
    "keys": keys,
    "memit": memit,
    "moments": moments,
    "solve": solve,
    "scoring": scoring,
    "generation": generation,
}
"""Name on the command line -> section."""


def our_targets(s: Setting, requests: Sequence[Request]) -> Targets:
    """As the editors find them."""
    groups = [[request] for request in requests]
    return optimise_targets(s.lm, groups, s.contexts, s.layer, s.target, batch_tokens=BATCH_TOKENS)


def our_keys(s: Setting, requests: Sequence[Request]) -> Tensor:
    """As the editors read them."""
    rows = [subject_rows(s.lm, requests, prefix) for prefix in s.contexts]
    seen = at_subject(s.lm, rows, s.layer, batch_tokens=BATCH_TOKENS).keys
    weights = context_weights("half-bare", len(s.contexts)).to(seen.device)
    return torch.einsum("p,npd->nd", weights, seen)


def our_edit(s: Setting, requests: Sequence[Request]) -> WeightEdit:
    """MEMIT, no factor of a moment being known."""
    return editor(s, Background(given=s.moments())).edit(s.lm, requests)


def editor(s: Setting, background: Background) -> Memit:
    """MEMIT with the baseline's numbers."""
    config = MemitConfig(
        layers=s.shape.layers,
        relaxation=RELAXATION,
        units="absolute",
        averaging="half-bare",
        contexts=tuple(s.contexts),
        target=s.target,
        keep_going=True,
    )
    return Memit(config, background)


def key_products(s: Setting, requests: Sequence[Request], layer: int | None = None) -> int:
    """Multiplications for the keys: tokens up to the subject and the layer, each beginning once."""
    rows = {row for prefix in s.contexts for row in subject_rows(s.lm, requests, prefix)}
    tokens = len({row[:end] for row in rows for end in range(1, len(row) + 1)})
    return tokens * block_products(s.lm, 0, s.layer if layer is None else layer)


def target_products(s: Setting, requests: Sequence[Request]) -> int:
    """Multiplications for the targets: a clean pass, 20 passes and 19 back over what remains."""
    rows = [e for prefix in s.contexts for e in encode_requests(s.lm, requests, prefix=prefix)]
    scored = sum(len(e.answer) for e in rows) + len(requests)
    remaining = sum(len(e.ids) - 1 - e.subject_last for e in rows) + len(requests)
    identity = [Request("{} is a", r.subject, r.target) for r in requests]
    last = encode_requests(s.lm, identity, target=False)
    clean = sum(len(e.ids) - 1 for e in rows) + sum(e.subject_last + 1 for e in last)
    above = block_products(s.lm, s.layer + 1, s.lm.layers - 1)
    steps = 2 * s.target.updates + 1
    return clean * block_products(s.lm, 0, s.lm.layers - 1) + steps * (
        remaining * above + scored * head_products(s.lm)
    )


def moment_products(s: Setting) -> int:
    """Multiplications for one token's part in the moments; the last MLP's output is not needed."""
    layers = s.shape.moment_layers
    d_out, d_in = weight_out_in(s.lm.mlp_out(layers[-1])).shape
    return block_products(s.lm, 0, layers[-1]) - d_out * d_in + len(layers) * d_in**2 // 2


def answers_of(case: Case) -> list[tuple[str, str]]:
    """Prompts of a case, each with an answer whose probability is asked."""
    asked = [q for group in questions(case).values() for q in group]
    return [(q.prompt, answer) for q in asked for answer in (q.answer, q.rival) if answer]


def score_products(s: Setting, cases: Sequence[Case]) -> int:
    """Multiplications for probabilities: each row of tokens once, the head where it is scored."""
    flat = sorted({pair for case in cases for pair in answers_of(case)})
    encoded = encode_answers(s.lm, [p for p, _ in flat], [a for _, a in flat])
    tokens = sum(map(len, {tuple(e.ids[:-1]) for e in encoded}))
    scored = len({tuple(e.ids[:i]) for e in encoded for i in range(e.prompt_length, len(e.ids))})
    return tokens * block_products(s.lm, 0, s.lm.layers - 1) + scored * head_products(s.lm)


def _row(
    bench: Bench,
    section: str,
    what: str,
    slow: Measured[Tensor],
    fast: Measured[Tensor],
    products: int,
    goal: float | None,
) -> Row:
    s = bench.setting
    return Row(
        section,
        s.name,
        what,
        fast.seconds,
        slow.seconds,
        off(fast.value, slow.value),
        bench.tolerance,
        fast.peak,
        slow.peak,
        products / rate_of(s) if products else 1.0,
        goal,
    )


def _scaled(measured_on: int, n: int) -> str:
    if measured_on >= n:
        return ""
    return f"serial targets measured on {measured_on} requests, scaled to {n}"
