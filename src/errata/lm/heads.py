"""What a network's head is for: which heads errata knows, and what transformers loads them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from errata.errors import ModelLoadError
from errata.lm.anatomy import Kind

Task = Literal["generate", "fill-mask", "classify"]


@dataclass(frozen=True)
class Head:
    """What a model answers with."""

    task: Task
    auto: Any
    """The class of transformers that loads such models."""


_CAUSAL = Head("generate", AutoModelForCausalLM)
_SEQ2SEQ = Head("generate", AutoModelForSeq2SeqLM)

HEADS: dict[Kind, dict[str, Head]] = {  # how the name of an architecture ends -> its head
    # Many bare models have a head all the same: their token embedding.
    "decoder": {"ForCausalLM": _CAUSAL, "LMHeadModel": _CAUSAL, "Model": _CAUSAL},
    "encoder-decoder": {"ForConditionalGeneration": _SEQ2SEQ, "Model": _SEQ2SEQ},
    "encoder": {
        "ForMaskedLM": Head("fill-mask", AutoModelForMaskedLM),
        "ForSequenceClassification": Head("classify", AutoModelForSequenceClassification),
    },
}


def head_of(kind: Kind, names: Sequence[str]) -> Head:
    """The head of a network of this kind, from the names of its class or architecture.

    Raises:
        ModelLoadError: errata knows no such head.
    """
    for name in names or ["Model"]:
        for ending, head in HEADS[kind].items():
            if name.endswith(ending):
                return head
    called = f"is called {names[0]!r}" if names else "has no 'architectures' in its config.json"
    raise ModelLoadError(
        f"this {kind} has no head that errata can ask ({' or '.join(HEADS[kind])}): it {called}. "
        "Load one that was trained with such a head."
    )


def labels_of(config: PretrainedConfig) -> tuple[str, ...]:
    """The names of a classifier's labels, in the order of its logits.

    Raises:
        ModelLoadError: it does not choose one of several labels.
    """
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    problem = getattr(config, "problem_type", None)
    if len(names) < 2 or problem not in (None, "single_label_classification"):
        raise ModelLoadError(
            "errata edits classifiers that choose one of several labels; this one has "
            f"{len(names)} and says problem_type = {problem!r}."
        )
    return names
