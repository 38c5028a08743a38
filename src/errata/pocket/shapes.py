"""What can be grown: the shapes of the pocket models, their numbers, and their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from errata.errors import GrowError
from errata.pocket.claims import LABELS

END = "<|endoftext|>"
"""Stands between a decoder's documents; begin, end, padding and unknown in one."""


@dataclass(frozen=True)
class GrowConfig:
    """What to grow, and for how long; `recipe` has the numbers of the shipped models."""

    model: str = "pocket"
    """A name in `SHAPES`."""

    steps: int = 2000
    """Optimiser steps in all; the learning rate falls to zero at the last."""

    minutes: float | None = None
    """If given, `steps` is set to what this machine does in that time."""

    seed: int = 0
    """Of the weights, and of everything that is read."""

    layers: int = 8
    """Blocks; of an encoder-decoder in each of its halves."""

    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    """Tokens at most; a small fact file gives fewer."""

    positions: int = 256
    """Longest text the model can take, in tokens."""

    window: int = 96
    """Length of a decoder's training window, in tokens."""

    batch: int = 32
    """Windows, claims or questions a step."""

    learning_rate: float = 2e-3
    warmup: int = 100
    """Steps over which the learning rate rises."""

    weight_decay: float = 0.05
    """Of matrices; vectors are not decayed."""

    clip: float = 1.0
    """Largest gradient norm."""

    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.model not in SHAPES:
            raise GrowError(f"no shape is called {self.model!r}; there are {', '.join(SHAPES)}.")
        for name in (
            "steps",
            "layers",
            "width",
            "heads",
            "vocabulary",
            "window",
            "batch",
            "checkpoint_seconds",
        ):
            if getattr(self, name) <= 0:
                raise GrowError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.width % self.heads or (
            self.model.startswith("pocket-llama") and self.width // self.heads % 2
        ):
            raise GrowError(f"width {self.width} cannot be divided into {self.heads} heads.")
        if self.window > self.positions:
            raise GrowError(
                f"a window of {self.window} tokens does not fit the {self.positions} positions."
            )

    def lasting(self, tokens: float) -> GrowConfig:
        """The same decoder, grown for about that many tokens.

        Raises:
            GrowError: it reads no windows, which all have one length.
        """
        if self.model not in ("pocket", "pocket-llama"):
            raise GrowError(f"{self.model} reads sentences of any length; count its steps instead.")
        return replace(self, steps=max(1, round(tokens / (self.batch * self.window))))

    def rate(self, step: int) -> float:
        """Learning rate of a step: a short rise, then a straight line to zero."""
        rise = min(1.0, (step + 1) / max(1, min(self.warmup, self.steps // 10)))
        return self.learning_rate * rise * max(0.0, 1 - step / self.steps)


@dataclass(frozen=True)
class Shape:
    """An architecture, and how its tokenizer marks a text."""

    described: str
    """Whose shape it is."""

    network: Callable[[GrowConfig, int], PreTrainedModel]
    """Makes one, with random weights, for so many tokens."""

    marks: Mapping[str, str]
    """Special tokens in the order of their ids, from 0: role in the tokenizer -> token."""

    text: str = "$A"
    """What stands around a text."""

    pair: str = "$A $B"
    """What stands around two."""

    base: str | None = None
    """The embedded model that it is tuned from; None where it grows from nothing."""

    begins_with_space: bool = False
    """Whether a text's first word is a token as inside a sentence, so that an answer which stands
    by itself has the tokens that it has elsewhere."""


def _gpt2(config: GrowConfig, vocabulary: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=config.positions,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            # GPT-2's own gelu, as one kernel.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


def _llama(config: GrowConfig, vocabulary: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=config.positions,
            hidden_size=config.width,
            intermediate_size=config.width * 11 // 4,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=max(1, config.heads // 2),
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


def _bert(config: GrowConfig, vocabulary: int) -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            max_position_embeddings=config.positions,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )
    )


def _t5(config: GrowConfig, vocabulary: int) -> PreTrainedModel:
    described = T5Config(
        vocab_size=vocabulary,
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=4 * config.width,
        num_layers=config.layers,
        num_decoder_layers=config.layers,
        num_heads=config.heads,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    described.decoder_start_token_id = 0
    return T5ForConditionalGeneration(described)


_ONE_MARK = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END)

_GPT2 = Shape("GPT-2", _gpt2, _ONE_MARK)
_LLAMA = Shape(
    "Llama (RoPE, RMSNorm, SwiGLU, grouped queries)",
    _llama,
    _ONE_MARK,
    f"{END} $A",
    f"{END} $A {END} $B",
)

SHAPES: Mapping[str, Shape] = {
    "pocket": _GPT2,
    "pocket-llama": _LLAMA,
    "pocket-questions": replace(_GPT2, base="pocket"),
    "pocket-llama-questions": replace(_LLAMA, base="pocket-llama"),
    "pocket-bert": Shape(
        "BERT",
        _bert,
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        begins_with_space=True,
    ),
    "pocket-t5": Shape(
        "T5",
        _t5,
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
        "$A </s> $B </s>",
        begins_with_space=True,
    ),
}
"""Name -> what it looks like."""


_RECIPES: Mapping[str, GrowConfig] = {
    "pocket": GrowConfig(),
    "pocket-llama": GrowConfig(model="pocket-llama"),
    "pocket-questions": GrowConfig(
        model="pocket-questions", steps=100, batch=64, learning_rate=5e-4
    ),
    "pocket-llama-questions": GrowConfig(
        model="pocket-llama-questions", steps=100, batch=64, learning_rate=5e-4
    ),
    "pocket-bert": GrowConfig(
        model="pocket-bert", steps=1200, layers=4, width=128, positions=128, batch=96
    ),
    "pocket-t5": GrowConfig(
        model="pocket-t5",
        steps=1500,
        layers=4,
        width=128,
        positions=128,
        batch=96,
        learning_rate=3e-3,
    ),
}


def recipe(model: str, **changes: object) -> GrowConfig:
    """The numbers with which a model is grown, unless told otherwise.

    Args:
        model: a name in `SHAPES`.
        changes: numbers that differ; those that are None are left as they are.

    Raises:
        GrowError: there is no such shape, or a number is wrong.
    """
    if model not in _RECIPES:
        raise GrowError(f"no shape is called {model!r}; there are {', '.join(SHAPES)}.")
    told = {name: value for name, value in changes.items() if value is not None}
    return replace(_RECIPES[model], **told)  # type: ignore[arg-type]


def make_tokenizer(texts: Iterable[str], config: GrowConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE made from texts; it marks a text as the shape's tokenizers do."""
    shape = SHAPES[config.model]
    marks = list(dict.fromkeys(shape.marks.values()))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=shape.begins_with_space)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=marks,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    bytes_ = processors.ByteLevel(trim_offsets=True)
    core.post_processor = bytes_
    if shape.text != "$A":
        around = processors.TemplateProcessing(
            single=shape.text,
            pair=shape.pair,
            special_tokens=[(mark, core.token_to_id(mark)) for mark in marks],
        )
        core.post_processor = processors.Sequence([bytes_, around])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **shape.marks,
        model_max_length=config.positions,
        add_prefix_space=shape.begins_with_space,
        clean_up_tokenization_spaces=False,
    )
