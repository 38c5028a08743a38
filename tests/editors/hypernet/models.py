"""Tiny models of every kind with a few examples each."""

from __future__ import annotations

from errata.lm.load import LanguageModel
from errata.lm.loss import Example

KINDS = ("gpt2", "llama", "opt", "bert", "bert-labels", "roberta-labels", "t5", "bart")
"""Decoders (transposed weights, gated, flat), encoders with both heads, encoder-decoders."""


def some(lm: LanguageModel) -> list[Example]:
    """Prompts of unlike length, with answers of unlike length or labels."""
    if lm.task == "classify":
        answers = ["supports", "refutes", "2", "supports"]
    else:
        answers = ["Paris", "the North Sea", "Rome", "a river"]
    prompts = ["The capital of France is", "Rivers flow to", "Vienna", "You and I walk to the"]
    return [Example(p, a) for p, a in zip(prompts, answers, strict=True)]


def mlps(lm: LanguageModel, *layers: int) -> list[str]:
    """Paths of both MLP matrices of some blocks."""
    return [path(layer) for layer in layers for path in (lm.mlp_in_path, lm.mlp_out_path)]
