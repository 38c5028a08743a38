"""Where things live in each model family: the only place that knows module paths.

A family is one entry in `FAMILIES`. Nothing else in errata names a module, a model type or a
layer class, so a new family is one entry, checked by `tests/lm/test_anatomy.py` on a tiny
random model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from transformers import PretrainedConfig

from errata.errors import UnknownFamilyError

Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True)
class Anatomy:
    """Module paths of one family; `{}` stands for the block's number.

    An encoder-decoder's paths are its decoder's; `encoder` has those of the stack below.
    """

    block: str
    """A transformer block; its (first) output is the residual stream."""
    mlp: str
    """The module whose output is the MLP's contribution."""
    mlp_in: str
    """First MLP matrix (the gate's partner where the MLP is gated)."""
    mlp_out: str
    """Last MLP matrix: its input is the key, its output the value."""
    attention: str
    """The attention module; its (first) output is attention's contribution."""
    attention_out: str
    """Last attention matrix."""
    embedding: str
    """The token embedding."""
    final_norm: str
    """The norm before the head; empty where there is none."""
    additive: bool = True
    """Whether the MLP's output is added to the stream as it is (no norm after it)."""
    flat_mlp: bool = False
    """Whether the MLP sees its batch as one row of tokens, (b * t, d); hooks undo it."""
    fixed_mask: bool = False
    """Whether attention's mask is a buffer of as many columns as the longest text has tokens."""
    padded_positions: bool = False
    """Whether a text's positions are counted from the pad token's number on."""
    kind: Kind = "decoder"
    """Whether tokens see what comes before them, everything, or a second text besides."""
    encoder: Anatomy | None = None
    """The stack that reads, in an encoder-decoder; its blocks are numbered first."""


_LLAMA = Anatomy(
    block="model.layers.{}",
    mlp="model.layers.{}.mlp",
    mlp_in="model.layers.{}.mlp.up_proj",
    mlp_out="model.layers.{}.mlp.down_proj",
    attention="model.layers.{}.self_attn",
    attention_out="model.layers.{}.self_attn.o_proj",
    embedding="model.embed_tokens",
    final_norm="model.norm",
)
_GEMMA = replace(_LLAMA, additive=False)
_T5_ENCODER = Anatomy(
    block="encoder.block.{}",
    mlp="encoder.block.{}.layer.1.DenseReluDense",
    mlp_in="encoder.block.{}.layer.1.DenseReluDense.wi",
    mlp_out="encoder.block.{}.layer.1.DenseReluDense.wo",
    attention="encoder.block.{}.layer.0.SelfAttention",
    attention_out="encoder.block.{}.layer.0.SelfAttention.o",
    embedding="shared",
    final_norm="encoder.final_layer_norm",
    kind="encoder",
)
_BART_ENCODER = Anatomy(
    block="model.encoder.layers.{}",
    mlp="model.encoder.layers.{}.fc2",  # BART has no MLP module of its own
    mlp_in="model.encoder.layers.{}.fc1",
    mlp_out="model.encoder.layers.{}.fc2",
    attention="model.encoder.layers.{}.self_attn",
    attention_out="model.encoder.layers.{}.self_attn.out_proj",
    embedding="model.shared",
    final_norm="",
    additive=False,
    kind="encoder",
)

FAMILIES: dict[str, Anatomy] = {
    "gpt2": Anatomy(
        block="transformer.h.{}",
        mlp="transformer.h.{}.mlp",
        mlp_in="transformer.h.{}.mlp.c_fc",
        mlp_out="transformer.h.{}.mlp.c_proj",
        attention="transformer.h.{}.attn",
        attention_out="transformer.h.{}.attn.c_proj",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
    ),
    "gpt_neo": Anatomy(
        block="transformer.h.{}",
        mlp="transformer.h.{}.mlp",
        mlp_in="transformer.h.{}.mlp.c_fc",
        mlp_out="transformer.h.{}.mlp.c_proj",
        attention="transformer.h.{}.attn.attention",
        attention_out="transformer.h.{}.attn.attention.out_proj",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        fixed_mask=True,
    ),
    "gptj": Anatomy(
        block="transformer.h.{}",
        mlp="transformer.h.{}.mlp",
        mlp_in="transformer.h.{}.mlp.fc_in",
        mlp_out="transformer.h.{}.mlp.fc_out",
        attention="transformer.h.{}.attn",
        attention_out="transformer.h.{}.attn.out_proj",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
    ),
    "gpt_neox": Anatomy(
        block="gpt_neox.layers.{}",
        mlp="gpt_neox.layers.{}.mlp",
        mlp_in="gpt_neox.layers.{}.mlp.dense_h_to_4h",
        mlp_out="gpt_neox.layers.{}.mlp.dense_4h_to_h",
        attention="gpt_neox.layers.{}.attention",
        attention_out="gpt_neox.layers.{}.attention.dense",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "opt": Anatomy(
        block="model.decoder.layers.{}",
        mlp="model.decoder.layers.{}.fc2",  # OPT has no MLP module of its own
        mlp_in="model.decoder.layers.{}.fc1",
        mlp_out="model.decoder.layers.{}.fc2",
        attention="model.decoder.layers.{}.self_attn",
        attention_out="model.decoder.layers.{}.self_attn.out_proj",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        flat_mlp=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": replace(_LLAMA, mlp_in="model.layers.{}.mlp.gate_up_proj"),
    "bert": Anatomy(
        block="bert.encoder.layer.{}",
        mlp="bert.encoder.layer.{}.output.dense",  # its half blocks end in a norm over the sum
        mlp_in="bert.encoder.layer.{}.intermediate.dense",
        mlp_out="bert.encoder.layer.{}.output.dense",
        attention="bert.encoder.layer.{}.attention.output.dense",
        attention_out="bert.encoder.layer.{}.attention.output.dense",
        embedding="bert.embeddings.word_embeddings",
        final_norm="",
        additive=False,
        kind="encoder",
    ),
    "roberta": Anatomy(
        block="roberta.encoder.layer.{}",
        mlp="roberta.encoder.layer.{}.output.dense",
        mlp_in="roberta.encoder.layer.{}.intermediate.dense",
        mlp_out="roberta.encoder.layer.{}.output.dense",
        attention="roberta.encoder.layer.{}.attention.output.dense",
        attention_out="roberta.encoder.layer.{}.attention.output.dense",
        embedding="roberta.embeddings.word_embeddings",
        final_norm="",
        additive=False,
        padded_positions=True,
        kind="encoder",
    ),
    "distilbert": Anatomy(
        block="distilbert.transformer.layer.{}",
        mlp="distilbert.transformer.layer.{}.ffn",
        mlp_in="distilbert.transformer.layer.{}.ffn.lin1",
        mlp_out="distilbert.transformer.layer.{}.ffn.lin2",
        attention="distilbert.transformer.layer.{}.attention",
        attention_out="distilbert.transformer.layer.{}.attention.out_lin",
        embedding="distilbert.embeddings.word_embeddings",
        final_norm="",
        additive=False,
        kind="encoder",
    ),
    "t5": Anatomy(
        block="decoder.block.{}",
        mlp="decoder.block.{}.layer.2.DenseReluDense",  # layer 1 looks at the encoder
        mlp_in="decoder.block.{}.layer.2.DenseReluDense.wi",
        mlp_out="decoder.block.{}.layer.2.DenseReluDense.wo",
        attention="decoder.block.{}.layer.0.SelfAttention",
        attention_out="decoder.block.{}.layer.0.SelfAttention.o",
        embedding="shared",
        final_norm="decoder.final_layer_norm",
        kind="encoder-decoder",
        encoder=_T5_ENCODER,
    ),
    "bart": Anatomy(
        block="model.decoder.layers.{}",
        mlp="model.decoder.layers.{}.fc2",
        mlp_in="model.decoder.layers.{}.fc1",
        mlp_out="model.decoder.layers.{}.fc2",
        attention="model.decoder.layers.{}.self_attn",
        attention_out="model.decoder.layers.{}.self_attn.out_proj",
        embedding="model.shared",
        final_norm="",
        additive=False,
        kind="encoder-decoder",
        encoder=_BART_ENCODER,
    ),
}


def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """The family's anatomy.

    Raises:
        UnknownFamilyError: the model type has no entry; the message says how to add one.
    """
    anatomy = FAMILIES.get(config.model_type)
    if anatomy is None:
        raise UnknownFamilyError(
            f"no anatomy for model type {config.model_type!r}.\n"
            f"  Known: {', '.join(sorted(FAMILIES))}.\n"
            "  To add it: one entry in FAMILIES (errata/lm/anatomy.py); "
            "tests/lm/test_anatomy.py then checks it on a tiny random model."
        )
    if not getattr(config, "do_layer_norm_before", True):
        # OPT-350m alone normalises after adding: its MLP's output is not the stream's last word.
        return replace(anatomy, additive=False, final_norm="")
    if getattr(config, "_remove_final_layer_norm", False):
        return replace(anatomy, final_norm="")
    if getattr(config, "is_gated_act", False):  # T5 since version 1.1
        assert anatomy.encoder is not None
        encoder = replace(anatomy.encoder, mlp_in=anatomy.encoder.mlp_in + "_1")
        return replace(anatomy, mlp_in=anatomy.mlp_in + "_1", encoder=encoder)
    return anatomy
