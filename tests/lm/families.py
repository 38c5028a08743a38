"""Tiny random models of every family, and small real tokenizers of every kind.

Nothing is downloaded: networks are random from their configurations, tokenizers are trained on a
few sentences in memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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
"""Decoders: name -> model type and what its configuration says; `-sliding` has a window of a few
tokens."""

_BERT = _WIDTHS | {"intermediate_size": 40}
_ROBERTA = _BERT | {"max_position_embeddings": MAX_LENGTH + 2, "pad_token_id": 1, "eos_token_id": 2}
_DISTILBERT = {
    "dim": 24,
    "hidden_dim": 40,
    "n_layers": 4,
    "n_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}
_LABELS = {"id2label": {0: "refutes", 1: "supports", 2: "0"}}
_T5 = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": MAX_LENGTH,
    "init_std": 0.2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}

OTHERS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "bert": ("bert", AutoModelForMaskedLM, "masked", _BERT),
    "bert-labels": ("bert", AutoModelForSequenceClassification, "masked", _BERT | _LABELS),
    "roberta": ("roberta", AutoModelForMaskedLM, "roberta", _ROBERTA),
    "roberta-labels": (
        "roberta",
        AutoModelForSequenceClassification,
        "roberta",
        _ROBERTA | _LABELS,
    ),
    "distilbert": ("distilbert", AutoModelForMaskedLM, "masked", _DISTILBERT),
    "distilbert-labels": (
        "distilbert",
        AutoModelForSequenceClassification,
        "masked",
        _DISTILBERT | _LABELS,
    ),
    "t5": ("t5", AutoModelForSeq2SeqLM, "t5", _T5),
    "t5-gated": (
        "t5",
        AutoModelForSeq2SeqLM,
        "t5",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("bart", AutoModelForSeq2SeqLM, "roberta", _BART),
}
"""Encoders and encoder-decoders: name -> model type, head, kind of tokenizer, configuration."""

_ALL: dict[str, tuple[str, Any, str, dict[str, Any]]] = OTHERS | {
    name: (model_type, AutoModelForCausalLM, "bytes", values)
    for name, (model_type, values) in VARIANTS.items()
}
assert {model_type for model_type, *_ in _ALL.values()} == set(FAMILIES)


def network(
    variant: str, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random network whose every parameter, biases and norms included, matters."""
    model_type, auto, _, values = _ALL[variant]
    general = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "attn_implementation": attention,
    }
    config = AutoConfig.for_model(model_type, **general | values)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(model, PreTrainedModel)
    model.eval()
    nn.Module.to(model, dtype)
    return model


_ROBERTA_SPECIAL = ("<pad>", "</s>", AddedToken("<mask>", lstrip=True, special=True))
"""Its mask takes the blank before it for its own."""


@cache
def _trained(kind: str) -> str:
    """The tokenizer's JSON; see `tokenizer`."""
    if kind in ("wordpiece", "masked"):
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            show_progress=False,
        )
    elif kind in ("metaspace", "t5"):
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
            special_tokens=["<s>", *(_ROBERTA_SPECIAL if kind == "roberta" else ())],
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
        "masked": "[CLS] $A [SEP]",
        "roberta": "<s> $A </s>",
        "t5": "$A </s>",
    }
    steps: list[Any] = []
    if kind.startswith("bytes") or kind == "roberta":
        steps.append(processors.ByteLevel(trim_offsets="trimmed" in kind))
    if kind in around:
        names = ("<s>", "</s>", "[CLS]", "[SEP]")
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
SentencePiece; WordPiece, lower-casing. These are the decoders'; the others have their own."""

_SPECIAL: dict[str, dict[str, Any]] = {
    "masked": {"mask_token": "[MASK]"},
    "roberta": {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": _ROBERTA_SPECIAL[-1],
    },
    "t5": {"eos_token": "</s>", "pad_token": "<s>"},
}


def tokenizer(kind: str = "bytes", **settings: Any) -> PreTrainedTokenizerFast:
    """A small real tokenizer with at most VOCABULARY tokens, `<s>` (0) its begin and its end."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)),
        **{"bos_token": "<s>", "eos_token": "<s>", "clean_up_tokenization_spaces": False}
        | _SPECIAL.get(kind, {})
        | settings,
    )


def tiny_lm(
    family: str = "gpt2",
    *,
    kind: str | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> LanguageModel:
    """A random language model of any variant, any kind of tokenizer; the caller may change it."""
    made = tokenizer(kind or _ALL[family][2], **settings)
    return LanguageModel.of(network(family, attention, dtype), made, name=f"tiny-{family}")


def decode(lm: LanguageModel, ids: list[int]) -> str:
    """The text of some tokens."""
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


__all__ = [
    "OTHERS",
    "TOKENIZERS",
    "VARIANTS",
    "VOCABULARY",
    "decode",
    "network",
    "tiny_lm",
    "tokenizer",
]
