"""A decoder of our own making in which we know where each fact lives.

It has the shape of GPT-2: one head, width 64, and a vocabulary of whole words. Nothing is trained:
every weight is zero but those named here, so that what methods find can be held against the truth.

- Each word is embedded in a dimension of its own; there are no positions.
- Each answer has a second dimension, which no embedding touches and which the head reads.
- The MLP of one block (`layer`) holds the facts, one neuron each: it fires (with 1) where the
  normalised stream points to the subject's last word, and adds `WRITTEN` to the answer's dimension.
  It is silent, exactly, where the stream is off by more than a cosine of 0.75. All other MLPs
  return 0 and have no gradient.
- The attention of the last block adds to each token the mean of all earlier tokens' normalised
  answer dimensions; all other attention returns 0.

So a fact is known at the subject's last word alone, from block `layer` on, and arrives at the last
token in the last block. Restoring an MLP's output matters there and nowhere else: elsewhere it is
0 in every run, or (at a subject's first word) 0 in the clean run.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from errata.lm.load import LanguageModel
from errata.requests import Request

PROMPT = "the birthplace of {} is"
FACTS = {
    "Ada Bell": "Rome",
    "Carl Dorn": "Paris",
    "Ella Frost": "Lima",
    "Hugo Ivory": "Cairo",
    "Juna Kern": "Madrid",
}
"""Subject -> birthplace; subjects are known by their last words."""
STRANGER = "Liam Moor"
"""A subject of whom the model knows nothing."""

LAYERS = 5
WIDTH = 64
WRITTEN = 5.0
THRESHOLD = 0.75
"""Cosine from which a neuron fires."""
MOVED = 3.0
"""By how much attention amplifies what it moves."""

WORDS = (
    "<end>",
    *PROMPT.replace("{} ", "").split(),
    *(word for subject in (*FACTS, STRANGER) for word in subject.split()),
    *FACTS.values(),
)


def request(subject: str = "Ada Bell", target: str = "Lima") -> Request:
    """Asks for another birthplace; `true` is what the model says."""
    return Request(PROMPT, subject, target, FACTS.get(subject))


def neuron(subject: str) -> int:
    """Which neuron of the planted layer holds the subject's fact."""
    return list(FACTS).index(subject)


def planted(layer: int = 2) -> LanguageModel:
    """The model with its facts in the MLP of block `layer`."""
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=32,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=1,
        n_inner=2 * len(FACTS),
        activation_function="relu",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".ln_" not in name:
                parameter.zero_()
        for word in range(len(WORDS)):
            network.transformer.wte.weight[word, word] = 1.0
        mlp = network.transformer.h[layer].mlp
        attention = network.transformer.h[-1].attn
        for subject, answer in FACTS.items():
            fact, word = neuron(subject), WORDS.index(subject.split()[-1])
            place = len(WORDS) + fact
            # An embedding, normalised, has sqrt(WIDTH - 1) in its own dimension.
            mlp.c_fc.weight[word, fact] = 1 / (1 - THRESHOLD) / (WIDTH - 1) ** 0.5
            mlp.c_fc.bias[fact] = -THRESHOLD / (1 - THRESHOLD)
            mlp.c_proj.weight[fact, place] = WRITTEN
            attention.c_attn.weight[place, 2 * WIDTH + place] = 1.0  # values; no queries, no keys
            attention.c_proj.weight[place, place] = MOVED
            network.lm_head.weight[WORDS.index(answer), place] = 1.0
    return LanguageModel.of(network, tokenizer(), name="planted")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )
