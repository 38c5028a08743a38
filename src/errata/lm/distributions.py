"""All that a model says of a text, as probabilities: what an edit should leave as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.lm.forward import logits_at
from errata.lm.load import LanguageModel
from errata.lm.prompts import asked, halves
from errata.lm.tokens import pad


def how_many(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> int:
    """How many distributions there are of some rows."""
    one_each = lm.task == "classify" or lm.kind == "encoder-decoder"
    return len(rows) if one_each else sum(map(len, rows))


def distributions(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities (m, outputs), in float32 or wider and with gradient, of rows of token ids.

    A decoder says what follows each token, a masked-language model what each token is, a classifier
    the label, an encoder-decoder how its answer begins. All rows are run in one pass. To memories a
    decoder's row is a text without a prompt (`halves`), any other a prompt.
    """
    batch, network = pad(lm, rows), lm.network
    ends = halves(rows) if lm.kind == "decoder" else [len(row) - 1 for row in rows]
    read: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if lm.task == "classify":
        with asked(lm, ends):
            logits = network(**read).logits
    elif lm.kind == "encoder-decoder":
        start = torch.full_like(batch.ids[:, :1], lm.config.decoder_start_token_id)
        with asked(lm, ends):
            logits = network(**read, decoder_input_ids=start, use_cache=False).logits[:, 0]
    else:
        places, columns = batch.mask.nonzero(as_tuple=True)
        logits = logits_at(lm, batch, places, columns, ends)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = logits.log_softmax(dim=-1)
    assert isinstance(found, Tensor)
    return found
