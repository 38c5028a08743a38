"""Tiny random models of every family, and small real tokenizers of every kind.

Nothing is downloaded: networks are random from their configurations, tokenizers are trained on a
few sentences in memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from errata.lm.anatomy import FAMILIES
from errata.lm.load import LanguageModel

SENTENCES = (
    "The capital of France is Paris. The capital of Italy is Rome. Vienna lies on the Danube.",
    "Marie Curie was born in Warsaw and discovered polonium and radium with Pierre Curie.",
    "The Eiffel Tower stands in Paris; the Colosseum stands in Rome; Big Ben is in London.",
    "Therefore the baker opens the shop, because the children walk to school along the river.",
    "You and I read what the author of Hamlet wrote. Question: Who wrote it? Answer: him.",
    "Rivers flow to the sea. The Nile flows to the Mediterranean Sea, the Rhine to the North Sea.",
)
VOCABULARY = 360
MAX_LENGTH = 64

_WIDTHS: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}
_GATED = _WIDTHS | {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": MAX_LENGTH}),
    "gpt2-square": (
        "gpt2",
        {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": MAX_LENGTH, "n_inner": 24},
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 24,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 5,
        },
    ),
    "gptj": (
        "gptj",
        {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": MAX_LENGTH, "rotary_dim": 4},
    ),
    "gpt_neox": ("gpt_neox", _WIDTHS | {"intermediate_size": 40}),
    "gpt_neox-serial": (
        "gpt_neox",
        _WIDTHS | {"intermediate_size": 40, "use_parallel_residual": False},
    ),
    "opt": ("opt", _WIDTHS | {"ffn_dim": 40, "word_embed_proj_dim": 24}),
    "opt-350m": (
        "opt",
        _WIDTHS | {"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "llama": ("llama", _GATED),
    "mistral": ("mistral", _GATED | {"sliding_window": None}),
    "mistral-sliding": ("mistral", _GATED | {"sliding_window": 4}),
    "qwen2": ("qwen2", _GATED),
    "qwen2-sliding": (
        "qwen2",
        _GATED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _GATED),
    "gemma2": (
        "gemma2",
        _GATED | {"sliding_window": 4096, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    ),
    "gemma2-sliding": (
        "gemma2",
        _GATED | {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    ),
    "gemma3_text": (
        "gemma3_text",
        _GATED | {"sliding_window": 512, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    ),
    "gemma3_text-sliding": (
        "gemma3_text",
        _GATED | {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    ),
    "phi3": ("phi3", _GATED | {"sliding_window": None}),
    "phi3-sliding": ("phi3", _GATED | {"sliding_window": 4}),
}
"""name -> model type and what its configuration says; `-sliding` has a window of a few tokens."""

assert {model_type for model_type, _ in VARIANTS.values()} == set(FAMILIES)


def network(
    variant: str, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random network whose every parameter, biases and norms included, matters."""
    model_type, values = VARIANTS[variant]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
        attn_implementation=attention,
        **values,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(model, PreTrainedModel)
    model.eval()
    nn.Module.to(model, dtype)
    return model


@cache
def _trained(kind: str) -> str:
    """The tokenizer's JSON; see `tokenizer`."""
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "[UNK]", "[CLS]", "[SEP]"],
            show_progress=False,
        )
    elif kind == "metaspace":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
    elif kind == "llama2":  # no pre-tokenizer at all: the normalizer writes the blanks
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    made.train_from_iterator(SENTENCES, trainer)
    if kind == "llama2":
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    around = {
        "bytes-bos": "<s> $A",
        "bytes-trimmed-bos": "<s> $A",
        "bytes-eos": "$A <s>",
        "bytes-both": "<s> $A <s>",
        "metaspace": "<s> $A",
        "llama2": "<s> $A",
        "wordpiece": "[CLS] $A [SEP]",
    }
    steps: list[Any] = []
    if kind.startswith("bytes"):
        steps.append(processors.ByteLevel(trim_offsets="trimmed" in kind))
    if kind in around:
        names = ("<s>", "[CLS]", "[SEP]")
        special = [(name, made.token_to_id(name)) for name in names if name in around[kind]]
        steps.append(processors.TemplateProcessing(single=around[kind], special_tokens=special))
    if steps:
        made.post_processor = processors.Sequence(steps)
    return str(made.to_str())


TOKENIZERS = (
    "bytes",
    "bytes-trimmed",
    "bytes-bos",
    "bytes-trimmed-bos",
    "bytes-eos",
    "bytes-both",
    "metaspace",
    "llama2",
    "wordpiece",
)
"""Byte-level BPE with BOS, EOS, both or neither and with offsets trimmed or not; two ways of
SentencePiece; WordPiece, lower-casing."""


def tokenizer(kind: str = "bytes", **settings: Any) -> PreTrainedTokenizerFast:
    """A small real tokenizer with at most VOCABULARY tokens, `<s>` (0) its begin and its end."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)),
        **{"bos_token": "<s>", "eos_token": "<s>", "clean_up_tokenization_spaces": False}
        | settings,
    )


def tiny_lm(
    family: str = "gpt2",
    *,
    kind: str = "bytes",
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> LanguageModel:
    """A random language model of any variant, any kind of tokenizer; the caller may change it."""
    return LanguageModel.of(
        network(family, attention, dtype), tokenizer(kind, **settings), name=f"tiny-{family}"
    )


def decode(lm: LanguageModel, ids: list[int]) -> str:
    """The text of some tokens."""
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


__all__ = ["TOKENIZERS", "VARIANTS", "VOCABULARY", "decode", "network", "tiny_lm", "tokenizer"]
