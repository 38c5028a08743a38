"""What is measured on: models of a real shape, real sentences of realistic length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from errata.editors.closed_form.statistics import Moments
from errata.editors.closed_form.targets import TargetConfig
from errata.jobs.cases import pocket_cases
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode
from errata.lm.weights import weight_out_in
from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.grow import GrowConfig, make_tokenizer
from errata.requests import Case, Request

CONTEXT_TOKENS = 10
CONTEXTS = 6
RELAXATION = 2000.0
"""Of the solves, absolute."""


@dataclass(frozen=True)
class Shape:
    """A model, and where it is edited."""

    build: Callable[[], PreTrainedModel] | None
    """Random weights of this shape; None loads the model of that name."""

    layers: tuple[int, ...]
    """Edited blocks; targets are found at the last."""

    moment_layers: tuple[int, ...]
    vocabulary: int = 4096
    """Of the tokenizer that is trained for it: 8 to 12 tokens a prompt, 2 to 4 a subject."""


def gpt2(**sizes: Any) -> Callable[[], PreTrainedModel]:
    """A random GPT-2; sizes as in its config.

    Weights are larger than an untrained model's usually are: it has to react to what is added to
    its stream, else targets have nothing to find.
    """
    spread = 1.5 / sizes["n_embd"] ** 0.5
    config = GPT2Config(bos_token_id=0, eos_token_id=0, initializer_range=spread, **sizes)
    return lambda: GPT2LMHeadModel(config)


def llama(**sizes: Any) -> Callable[[], PreTrainedModel]:
    """A random Llama; sizes as in its config."""
    spread = 1.5 / sizes["hidden_size"] ** 0.5
    config = LlamaConfig(bos_token_id=0, eos_token_id=0, initializer_range=spread, **sizes)
    return lambda: LlamaForCausalLM(config)


SHAPES: dict[str, Shape] = {
    "random-gpt2-small": Shape(
        gpt2(n_layer=12, n_embd=768, n_head=12), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)
    ),
    "pocket": Shape(None, (1, 2, 3), (1, 2, 3, 4, 5)),
    "random-pocket": Shape(
        gpt2(n_layer=8, n_embd=256, n_head=4, vocab_size=8192, n_positions=256),
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        vocabulary=8192,
    ),
    "random-llama-7b": Shape(
        llama(hidden_size=4096), (4, 5, 6, 7, 8), (4, 5, 6, 7, 8)
    ),  # the config's defaults
    "tiny-gpt2": Shape(
        gpt2(n_layer=4, n_embd=32, n_head=4, vocab_size=512, n_positions=128),
        (0, 1),
        (0, 1),
        vocabulary=512,
    ),
    "tiny-llama": Shape(
        llama(
            num_hidden_layers=4,
            hidden_size=32,
            intermediate_size=88,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=128,
        ),
        (0, 1),
        (0, 1),
        vocabulary=512,
    ),
}
"""Name on the command line -> shape."""


@dataclass(eq=False)
class Setting:
    """A model with everything that the sections ask of it; the same for the same seed."""

    name: str
    lm: LanguageModel
    shape: Shape
    target: TargetConfig = field(
        default_factory=lambda: TargetConfig(
            units="absolute", updates=19, learning_rate=0.5, clamp=4.0, decay=0.5, stop_below=0.0
        )
    )
    """MEMIT's numbers; `stop_below` 0, so that both sides do every update. The clamp is wider,
    since random weights need more to be moved."""

    @classmethod
    def of(cls, name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Setting:
        """Build or load the model.

        Raises:
            ModelLoadError: it does not come with this installation.
        """
        shape = SHAPES[name]
        if shape.build is None:
            return cls(name, LanguageModel.load(name, device=device, dtype=dtype), shape)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                network = shape.build()
        finally:
            torch.set_default_dtype(before)
        tokenizer = make_tokenizer(Encyclopedia.load(), GrowConfig(vocabulary=shape.vocabulary))
        return cls(name, LanguageModel.of(network, tokenizer, name=name), shape)

    @property
    def layer(self) -> int:
        """Where targets are found."""
        return self.shape.layers[-1]

    @cached_property
    def cases(self) -> list[Case]:
        """One case for each subject of the pocket encyclopedia's benchmark."""
        first: dict[str, Case] = {}
        for case in pocket_cases():
            first.setdefault(case.request.subject, case)
        return list(first.values())

    @cached_property
    def requests(self) -> list[Request]:
        """As many as wanted: where the cases do not suffice, subjects are numbered."""
        requests = [case.request for case in self.cases]
        numbered = [
            Request(r.prompt, f"{r.subject} {number}", r.target, r.true)
            for number in range(2, 2 + 1000 // len(requests))
            for r in requests
        ]
        return requests + numbered

    @cached_property
    def contexts(self) -> list[str]:
        """The bare prompt, and beginnings of sentences of 10 tokens."""
        sentences = Encyclopedia.load().sentences
        rows = encode(self.lm, sentences)
        long = [row[:CONTEXT_TOKENS] for row in rows if len(row) >= CONTEXT_TOKENS]
        texts = [str(self.lm.tokenizer.decode(row, skip_special_tokens=True)) for row in long]
        return ["", *(f"{text}. " for text in texts[: CONTEXTS - 1])]

    def moments(self) -> Moments:
        """Random second moments, positive definite; fresh each time, so that no factor is known."""
        return Moments.of(self._means, device=self.lm.device)

    @cached_property
    def _means(self) -> dict[int, Tensor]:
        means = {}
        for layer in self.shape.layers:
            width = weight_out_in(self.lm.mlp_out(layer)).shape[1]
            generator = torch.Generator(self.lm.device).manual_seed(layer)
            x = torch.randn(2 * width, width, generator=generator, device=self.lm.device)
            means[layer] = x.mT @ x / len(x)
        return means

    def texts(self, tokens: int) -> list[str]:
        """Documents of `tokens` tokens in all, to the token."""
        lines = Encyclopedia.load().statements(words=tokens).splitlines()
        texts: list[str] = []
        left = tokens
        for line, row in zip(lines, encode(self.lm, lines), strict=True):
            if len(row) > left:
                break
            texts.append(line)
            left -= len(row)
        return texts
