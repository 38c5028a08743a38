"""All that a model says of a text, as probabilities: what an edit should leave as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.lm.forward import logits_at
from errata.lm.load import LanguageModel
from errata.lm.tokens import pad


def distributions(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities (m, outputs), in float32 or wider and with gradient, of rows of token ids.

    A decoder says what follows each token, a masked-language model what each token is, a classifier
    the label, an encoder-decoder how its answer begins. All rows are run in one pass.
    """
    batch, network = pad(lm, rows), lm.network
    read: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if lm.task == "classify":
        logits = network(**read).logits
    elif lm.kind == "encoder-decoder":
        start = torch.full_like(batch.ids[:, :1], lm.config.decoder_start_token_id)
        logits = network(**read, decoder_input_ids=start, use_cache=False).logits[:, 0]
    else:
        logits = logits_at(lm, batch, *batch.mask.nonzero(as_tuple=True))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    said = logits.log_softmax(dim=-1)
    assert isinstance(said, Tensor)
    return said
