"""What is measured on: models of a real shape, real sentences of realistic length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
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

from errata.editors.closed_form.moments import Moments
from errata.editors.closed_form.targets import TargetConfig
from errata.jobs.cases import pocket_cases
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode, encode_requests
from errata.lm.weights import weight_out_in
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.pocket.lessons import Windows
from errata.pocket.shapes import GrowConfig, make_tokenizer
from errata.requests import Case, Request

CONTEXT_TOKENS = 10
CONTEXTS = 6
DISTINCT = 200
"""Requests with a subject of their own; more are made by numbering these."""

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
        gpt2(n_layer=4, n_embd=32, n_head=4, vocab_size=4096, n_positions=256),
        (0, 1),
        (0, 1),
    ),
    "tiny-llama": Shape(
        llama(
            num_hidden_layers=4,
            hidden_size=32,
            intermediate_size=88,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=4096,
            max_position_embeddings=256,
        ),
        (0, 1),
        (0, 1),
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
        config = GrowConfig(vocabulary=shape.vocabulary)
        tokenizer = make_tokenizer(Windows(Encyclopedia.load(), config).texts(), config)
        return cls(name, LanguageModel.of(network, tokenizer, name=name), shape)

    @property
    def layer(self) -> int:
        """Where targets are found."""
        return self.shape.layers[-1]

    @cached_property
    def cases(self) -> list[Case]:
        """The pocket benchmark in CounterFact's shape: two paraphrases, each after a sentence."""
        openings = cycle(Encyclopedia.load().openings)
        return [
            replace(
                case,
                paraphrases=tuple(f"{next(openings)} {text}" for text in case.paraphrases[:2]),
                same_subject=(),
            )
            for case in pocket_cases()
        ]

    @cached_property
    def requests(self) -> list[Request]:
        """Facts in templates of CounterFact's lengths, one for each subject; numbered after that.

        The prompt has 8 to 12 tokens, the subject 2 to 4, at most 4 follow it (in CounterFact 3
        words do, on average), and the target has at most 3.
        """
        book, random = Encyclopedia.load(), stable_random("benchmarks")
        objects: dict[str, list[str]] = {}
        for fact in book.facts:
            objects.setdefault(fact.relation, []).append(fact.object)
        found: dict[str, Request] = {}
        for fact in random.sample(book.facts, len(book.facts)):
            other = random.choice(objects[fact.relation])
            if other == fact.object or fact.subject in found:
                continue
            if len(found) == DISTINCT:
                break
            asked = [
                Request(template, fact.subject, other, fact.object)
                for template in book.relations[fact.relation].templates
            ]
            for request, row in zip(asked, encode_requests(self.lm, asked), strict=True):
                subject = row.subject_last + 1 - row.subject_first
                after = row.prompt_length - 1 - row.subject_last
                short = after <= 4 and len(row.answer) <= 3
                if short and 8 <= row.prompt_length <= 12 and 2 <= subject <= 4:
                    found[fact.subject] = request
                    break
        requests = list(found.values())
        for number in range(2, 2 + 1000 // len(requests)):
            requests += [replace(r, subject=f"{r.subject} {number}") for r in found.values()]
        return requests

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
