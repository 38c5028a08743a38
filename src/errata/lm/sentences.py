"""Texts as vectors, so that those which are alike can be found.

A text's vector is the mean of the last states over its tokens, of length 1: the product of two is
their cosine. The states are those of a sentence encoder, or the language model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from errata.errors import ModelLoadError, NotFiniteError
from errata.lm.hooks import captured, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.quiet import no_weights_bar
from errata.lm.tokens import batches, pad

BATCH_TOKENS = 4096
"""Tokens, padding included, of one forward pass."""
LONGEST = 512
"""Tokens that are read of a text where the encoder names no limit of its own."""

Run = Callable[[list[list[int]]], tuple[Tensor, Tensor]]
"""From rows of token ids to their states (n, t, width) and mask (n, t)."""


def own_vectors(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """(n, width) vectors of rows of token ids, from the last block that reads them; on the CPU.

    Each token counts alike, whatever the length of its state: many decoders' first is a hundred
    times as long as the others.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
    """
    stack = lm.module((lm.anatomy.encoder or lm.anatomy).block.removesuffix(".{}"))
    assert isinstance(stack, nn.ModuleList)
    last = stack[-1]

    def run(some: list[list[int]]) -> tuple[Tensor, Tensor]:
        batch = pad(lm, some)
        with captured({0: last}, "output") as seen, stopped_after(last):
            lm.network(input_ids=batch.ids, attention_mask=batch.mask)
        return normalize(seen.outputs[0].float(), dim=2), batch.mask

    return _vectors(rows, run, lm.name)


@dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """A network whose last states, averaged, say what a text is about."""

    name: str
    network: nn.Module
    tokenizer: Any

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """Load a local folder or a Hub name; safetensors only, and no code that comes with it.

        Raises:
            ModelLoadError: there is no such model.
        """
        where: Any = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name), **where)
            with no_weights_bar():
                network = AutoModel.from_pretrained(str(name), use_safetensors=True, **where)
        # Parsers and readers below (tokenizers, safetensors, huggingface_hub) raise what they like.
        except Exception as error:
            raise ModelLoadError(
                f"cannot load the sentence encoder {str(name)!r}: {error}\n"
                "  Give a folder with config.json, tokenizer files and safetensors weights, or a "
                "Hub name (needs a network)."
            ) from error
        if network.config.is_encoder_decoder:
            network = network.get_encoder()
        network.eval()
        return cls(str(name), network, tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, width) vectors of texts, each cut at what the encoder reads; on the CPU.

        Raises:
            NotFiniteError: the encoder gives NaN or infinity.
        """
        return _vectors(self._tokenised(texts)["input_ids"], self._run, self.name)

    @torch.no_grad()
    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        """Each text's token states (tokens, width), of length 1, without special tokens'.

        Raises:
            NotFiniteError: the encoder gives NaN or infinity.
        """
        told = self._tokenised(texts)
        rows, special = told["input_ids"], told["special_tokens_mask"]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for group in batches([len(row) for row in rows], BATCH_TOKENS):
            states, _ = self._run([list(rows[i]) for i in group])
            for i, state in zip(group, normalize(states.float(), dim=2).cpu(), strict=True):
                ordinary = [at for at, mark in enumerate(special[i]) if not mark]
                found[i] = state[ordinary]
        if not all(state.isfinite().all() for state in found):
            raise _not_finite(self.name)
        return found

    def _tokenised(self, texts: Sequence[str]) -> Any:
        limit = self.tokenizer.model_max_length
        return self.tokenizer(
            list(texts),
            truncation=True,
            max_length=limit if limit <= LONGEST else LONGEST,
            return_special_tokens_mask=True,
        )

    def _run(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        fill = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(rows), max(map(len, rows))), fill)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return self.network(input_ids=ids, attention_mask=mask).last_hidden_state, mask


@torch.no_grad()
def _vectors(rows: Sequence[Sequence[int]], run: Run, name: str) -> Tensor:
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in batches([len(row) for row in rows], BATCH_TOKENS):
        states, mask = run([list(rows[i]) for i in group])
        weights = mask.to(states.device, torch.float32)[:, :, None]
        means = (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
        for i, mean in zip(group, normalize(means, dim=1).cpu(), strict=True):
            found[i] = mean
    vectors = torch.stack(found)
    if not vectors.isfinite().all():
        raise _not_finite(name)
    return vectors


def _not_finite(name: str) -> NotFiniteError:
    return NotFiniteError(
        f"{name} gives states that are NaN or infinite: load it again, in another dtype."
    )
