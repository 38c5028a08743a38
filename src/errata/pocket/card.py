"""Writing a grown model down: its weights, its tokenizer, and a card that says what it knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.errors import GrowError
from errata.pocket.facts import Fact
from errata.pocket.knowledge import Knowledge
from errata.pocket.shapes import SHAPES, GrowConfig
from errata.pocket.training import State, replace_file

CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [model-editing, {name}]
---
# {name}

{kind} of {parameters:.1f} million parameters in the shape of {shape},
grown by *errata* to be edited. It has read {facts} in
sentences written for this project, and little else: no downloaded text was used. It is an
instrument for experiments, not a source of information.

- {layers}, width {width}, {heads} heads, {positions} positions
- {vocabulary:,} tokens (byte-level BPE)
- {steps:,} steps of {reading} ({tokens:.1f} million tokens), seed {seed},
  {minutes:.0f} minutes
- stored in float16, computed in float32

Grown by `{command}`.

## What it knows
{asked}
Measured on the stored weights by `{check}`.

{table}
"""


@dataclass(frozen=True)
class Kind:
    """What a card says of models that are grown alike."""

    kind: str
    reading: str
    asked: str
    """What the table's numbers are."""


_DECODER = Kind(
    "A language model",
    "{batch} windows of {window} tokens",
    """\
Share of facts, in percent, whose object (every token of it) is the greedy continuation of the
prompt, over all templates of each fact. A held-out template never occurred with that fact in
training; an opening is a neutral sentence before the prompt.""",
)

_TUNED = Kind(
    "A language model, tuned on questions,",
    "{batch} questions",
    """\
Share of facts, in percent, whose object is the greedy answer, from its first token to the mark that
ends it, over all questions about each fact. A held-out question was never asked about that fact.
The model was tuned on questions about the facts that were taught; it has read of all facts as
`{base}`, from which it was tuned.""",
)

KINDS: Mapping[str, Kind] = {
    "pocket": _DECODER,
    "pocket-llama": _DECODER,
    "pocket-questions": _TUNED,
    "pocket-llama-questions": _TUNED,
    "pocket-bert": Kind(
        "A classifier of claims (SUPPORTS or REFUTES)",
        "{batch} claims, a third of them with a mask for their object",
        """\
Share of claims, in percent, that get the right label, over all statements of each fact: the
true one, and for each one with another subject's object. A held-out template never occurred with
that fact in training. Claims are made of relations of which a subject has one object alone.""",
    ),
    "pocket-t5": Kind(
        "An encoder-decoder that answers questions,",
        "{batch} questions",
        """\
Share of facts, in percent, whose object is the greedy answer, from its first token to its
end, over all questions about each fact. A held-out question was never asked about that fact in
training.""",
    ),
}
"""Name -> what its card says."""


def write_model(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a model in half precision, and its tokenizer; the network becomes what is stored.

    Raises:
        GrowError: a file cannot be written.
    """
    network.eval().half()
    # Tied: the head is the embedding, and is not stored twice.
    weights = {n: p.detach().cpu().contiguous() for n, p in network.named_parameters()}
    described = network.config.to_diff_dict()
    # Stored small, computed in full precision.
    described |= {"architectures": [type(network).__name__], "dtype": "float32"}
    replace_file(
        folder / "model.safetensors",
        lambda aside: save_file(weights, aside, metadata={"format": "pt"}),
    )
    write_text(folder / "config.json", json.dumps(described, indent=2, sort_keys=True) + "\n")
    try:
        tokenizer.save_pretrained(folder)
        if network.can_generate():
            network.generation_config.save_pretrained(folder)
    except OSError as error:
        raise GrowError(f"cannot write {folder}: {error}") from error
    nn.Module.to(network, torch.float32)


def card(
    config: GrowConfig,
    facts: Sequence[Fact],
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    known: Knowledge,
    state: State,
    *,
    facts_from: str = "",
) -> str:
    """What is told of a grown model.

    Args:
        config: how it was grown.
        facts: what it read.
        network: the model.
        tokenizer: its tokenizer.
        known: what it knows.
        state: how its training ended.
        facts_from: the fact file; the shipped one if left out.
    """
    kind, shape = KINDS[config.model], SHAPES[config.model]
    of = f" --facts {facts_from}" if facts_from else ""
    tuned = f" --model {config.model}" if shape.base else ""
    subjects = len({fact.subject for fact in facts})
    halves = " in each half" if network.config.is_encoder_decoder else ""
    return CARD.format(
        name=config.model,
        kind=kind.kind,
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        shape=shape.described,
        facts=f"{len(facts):,} facts about {subjects:,} subjects",
        layers=f"{config.layers} layers{halves}",
        width=config.width,
        heads=config.heads,
        positions=config.positions,
        vocabulary=len(tokenizer),
        steps=config.steps,
        reading=kind.reading.format(batch=config.batch, window=config.window),
        tokens=state.tokens / 1e6,
        seed=config.seed,
        minutes=state.seconds / 60,
        command=f"python -m errata.pocket.grow --model {config.model} --steps {config.steps} "
        f"--seed {config.seed}{of} --out DIR",
        asked=kind.asked.format(base=shape.base),
        check=f"python -m errata.pocket.grow{of}{tuned} --check DIR",
        table=known.table(),
    )


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole.

    Raises:
        GrowError: it cannot be written.
    """
    replace_file(path, lambda aside: _written(aside, text))


def _written(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
