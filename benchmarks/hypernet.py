"""Fitting MEND's network: edits of a step in one batch against one edited model after another.

The baseline is the reference code's loop: for each edit a backward pass for the gradients, a model
of its own in which the edited weights are dense sums, called through `torch.func.functional_call`
with all weights, logits at all positions, and the gradients summed up over the edits of a step.

An edit of a network that is there is measured against fine-tuning the same matrices, which is all
that one could do without it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from benchmarks.measure import (
    Row,
    alternated,
    block_products,
    head_products,
    off,
    rate_of,
)
from benchmarks.sections import Bench
from errata.editors.background import Background
from errata.editors.hypernet.gradients import Decomposed, decompose, stacked
from errata.editors.hypernet.learnt import mlp_paths
from errata.editors.hypernet.mend import FittedMend, Mend, MendConfig
from errata.editors.hypernet.objective import ObjectiveConfig, Questions, outer_loss
from errata.editors.hypernet.transform import TransformConfig, Update
from errata.editors.trainable import Fit
from errata.editors.tuning.finetune import FineTune, FineTuneConfig
from errata.lm.hooks import captured
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.lm.tokens import encode_answers
from errata.requests import Case

EDITS = 10
"""Of a step."""
AT_ONCE = (10, 5, 2)
"""How many of them are in memory together (`training.at_once`)."""
RANK = 256
BATCH = 64
"""Edits at once, of edits with a network that is there."""


def fitting(bench: Bench) -> Iterator[Row]:
    """One step of the outer loop, its gradients for the network and no more."""
    lm = bench.setting.lm
    layers = Mend(MendConfig(), Background()).layers(lm)
    update = Update.of(lm, mlp_paths(lm, layers), TransformConfig(rank=RANK))
    cases = bench.setting.cases[: EDITS * 3]
    started(lm, update, cases[EDITS:])
    (asked,) = questions(cases[:EDITS], EDITS)
    for at_once in AT_ONCE:
        parts = questions(cases[:EDITS], at_once)
        yield _fitting(bench, update, layers, asked, parts)


def _fitting(
    bench: Bench,
    update: Update,
    layers: Sequence[int],
    asked: Questions,
    parts: Sequence[Questions],
) -> Row:
    """A step on the same edits, in these parts, beside the reference's loop."""
    lm = bench.setting.lm
    slow, fast = alternated(
        partial(one_by_one, lm, update, asked),
        partial(together, lm, update, parts),
        bench.device,
        bench.rounds,
    )
    return Row(
        section="fitting",
        model=bench.setting.name,
        what=f"{EDITS} edits a step, {len(parts[0].edits)} at once",
        seconds=fast.seconds,
        serial_seconds=slow.seconds,
        difference=off(fast.value[None], slow.value[None]),
        tolerance=bench.tolerance,
        peak=fast.peak,
        serial_peak=slow.peak,
        floor=_products(lm, update, asked, layers) / rate_of(bench.setting),
        goal=bench.goal(2),
        note=f"blocks {layers[0]} to {layers[-1]}, rank {RANK}; "
        f"{EDITS / fast.seconds:.1f} edits a second, serial {EDITS / slow.seconds:.1f}",
    )


def learnt_edits(bench: Bench) -> Iterator[Row]:
    """An edit with MEND's network against fine-tuning (FT, at its defaults), alone and of 64."""
    setting = bench.setting
    lm = setting.lm
    layers = Mend(MendConfig(), Background()).layers(lm)
    update = Update.of(lm, mlp_paths(lm, layers), TransformConfig(rank=RANK))
    started(lm, update, setting.cases[:EDITS])
    config = MendConfig(layers=layers, network=update.config)
    mend = FittedMend(config, Fit.of(lm, update.paths), update)
    tuned = FineTuneConfig(layers=layers, matrices="mlp_in+mlp_out", stop_below=0.0)
    finetune = FineTune(tuned, Background())
    for count in (1, BATCH):
        requests = [case.request for case in setting.cases[:count]]
        (asked,) = questions(setting.cases[:count], count)
        slow, fast = alternated(
            partial(finetune.edit, lm, requests),
            partial(mend.edit, lm, requests),
            bench.device,
            bench.rounds,
        )
        yield Row(
            section="learnt-edits",
            model=setting.name,
            what="1 edit" if count == 1 else f"{count} edits at once",
            seconds=fast.seconds,
            serial_seconds=slow.seconds,
            difference=None,  # two ways to edit
            tolerance=None,
            peak=fast.peak,
            serial_peak=slow.peak,
            floor=_edit_products(lm, update, asked, layers) / rate_of(setting),
            note=f"blocks {layers[0]} to {layers[-1]}, rank {RANK}; MEND over FT of "
            f"{tuned.updates} updates; {1000 * fast.seconds / count:.0f} ms an edit",
        )


HYPERNET_SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "fitting": fitting,
    "learnt-edits": learnt_edits,
}
"""Name on the command line -> section."""


def started(lm: LanguageModel, update: Update, cases: Sequence[Case]) -> None:
    """Let the network see some gradients, and move it from where it passes everything on."""
    with torch.no_grad():
        update(decompose(lm, questions(cases, len(cases))[0].edits, update.paths))
        for parameter in update.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    update.eval()


def questions(cases: Sequence[Case], at_once: int) -> list[Questions]:
    """What the edits of a step are asked, in parts; the same in whatever parts."""
    draw = random.Random(0)
    return [
        Questions.of(cases[i : i + at_once], draw, ObjectiveConfig())
        for i in range(0, len(cases), at_once)
    ]


def together(lm: LanguageModel, update: Update, parts: Sequence[Questions]) -> Tensor:
    """Our way; the gradient of all parameters, in one row."""
    update.zero_grad()
    for asked in parts:
        changes = stacked(update(decompose(lm, asked.edits, update.paths)), len(asked.edits))
        loss = outer_loss(lm, asked, changes, ObjectiveConfig())["loss"]
        torch.autograd.backward(loss * (len(asked.edits) / EDITS))
    return gradient(update)


def one_by_one(lm: LanguageModel, update: Update, asked: Questions) -> Tensor:
    """The reference's way."""
    update.zero_grad()
    weights = {f"{path}.weight" for path in update.paths}
    parameters = dict(lm.network.named_parameters())
    asks = {name: p.requires_grad for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in weights)
    config = ObjectiveConfig()
    for edit, wanted, kept in zip(asked.edits, asked.wanted, asked.kept, strict=True):
        changes = update(raw_factors(lm, edit, update.paths))
        edited: dict[str, Tensor] = {name: p.detach() for name, p in parameters.items()}
        for path, rows in changes.items():
            dense = rows.deltas.T @ rows.inputs
            transposed = isinstance(lm.module(path), Conv1D)
            name = f"{path}.weight"
            edited[name] = edited[name] + (dense.T if transposed else dense)
        with torch.no_grad():
            before, _ = predicted(lm, kept, lm.network)
        network = partial(functional_call, lm.network, edited)
        after, _ = predicted(lm, kept, network)
        new, tokens = predicted(lm, wanted, network)
        loss = -new.gather(1, tokens[:, None]).mean()
        moved = (before.exp() * (before - after)).sum(-1).mean()
        total = (config.edit * loss + config.kept * moved) / len(asked.edits)
        torch.autograd.backward(total, inputs=list(update.parameters()))
    for name, parameter in parameters.items():
        parameter.requires_grad_(asks[name])
    return gradient(update)


def raw_factors(lm: LanguageModel, example: Example, paths: Sequence[str]) -> dict[str, Decomposed]:
    """Each matrix' inputs and output gradients, from one forward and one full backward pass."""
    deltas: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: deltas.__setitem__(path, gradient[0])
            )

        return hook

    handles = [lm.module(path).register_forward_hook(keep(path)) for path in paths]
    try:
        with captured({path: lm.module(path) for path in paths}) as seen:
            logprobs, tokens = predicted(lm, example, lm.network)
            torch.autograd.backward(-logprobs.gather(1, tokens[:, None]).mean())
    finally:
        for handle in handles:
            handle.remove()
    lm.network.zero_grad(set_to_none=True)
    found = {}
    for path in paths:
        x, delta = seen.inputs[path][0].detach(), deltas[path]
        real = (x != 0).any(-1) & (delta != 0).any(-1)
        owner = torch.zeros(int(real.sum()), dtype=torch.long, device=x.device)
        found[path] = Decomposed(x[real], delta[real], owner)
    return found


def predicted(
    lm: LanguageModel, example: Example, network: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (m, vocabulary) where an answer's m tokens stand, and the tokens."""
    (row,) = encode_answers(lm, [example.prompt], [example.answer])
    ids = torch.tensor([row.ids], device=lm.device)
    values = {"input_ids": ids, "use_cache": False}
    called = network(kwargs=values, args=()) if isinstance(network, partial) else network(**values)
    logprobs = called.logits[0].log_softmax(-1)
    return logprobs[row.prompt_length - 1 : -1], ids[0, row.prompt_length :]


def gradient(update: Update) -> Tensor:
    """All parameters' gradients in one row."""
    return torch.cat([p.grad.flatten() for p in update.parameters() if p.grad is not None])


def _products(lm: LanguageModel, update: Update, asked: Questions, layers: Sequence[int]) -> int:
    """Multiplications of one step: passes, gradients of states above the first edited block."""
    passes = _passes(lm, [(asked.edits, 1), (asked.wanted, 1), (asked.kept * 2, 0.5)], layers)
    return passes + 3 * _network_products(lm, update, asked)


def _edit_products(
    lm: LanguageModel, update: Update, asked: Questions, layers: Sequence[int]
) -> int:
    """Multiplications of some edits: one pass forward and back, one through the network."""
    return _passes(lm, [(asked.edits, 1)], layers) + _network_products(lm, update, asked)


def _network_products(lm: LanguageModel, update: Update, asked: Questions) -> int:
    """Multiplications of the network's forward pass."""
    total = 0
    for rows in decompose(lm, asked.edits, update.paths).values():
        width = rows.inputs.shape[1] + rows.deltas.shape[1]
        total += 2 * 2 * min(RANK, width) * width * len(rows.owner)
    return total


def _passes(
    lm: LanguageModel, asked: Sequence[tuple[Sequence[Example], float]], layers: Sequence[int]
) -> int:
    """Multiplications of passes, and of as many as said back to the first edited block."""
    whole = block_products(lm, 0, lm.layers - 1)
    above = block_products(lm, layers[0], lm.layers - 1)
    total = 0
    for examples, backward in asked:
        rows = encode_answers(lm, [e.prompt for e in examples], [e.answer for e in examples])
        total += int(sum(len(row.ids) for row in rows) * (whole + backward * above))
        total += int(sum(len(row.answer) for row in rows) * (1 + backward) * head_products(lm))
    return total
