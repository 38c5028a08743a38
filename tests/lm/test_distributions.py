"""What a model says of whole rows, against its plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from errata.lm.distributions import distributions, how_many
from errata.lm.tokens import encode
from tests.lm.families import tiny_lm

TEXTS = ["The capital of France is Paris.", "Rome"]


@pytest.mark.parametrize("variant", ["gpt2", "opt", "bert"])
def test_every_token_of_every_row_has_its_say(variant: str) -> None:
    lm = tiny_lm(variant)
    rows = encode(lm, TEXTS)
    found = distributions(lm, rows)
    plain = [lm.network(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
    assert_close(found, torch.cat(plain), rtol=1e-4, atol=1e-5)
    assert len(found) == how_many(lm, rows)


def test_a_classifier_says_its_label_once() -> None:
    lm = tiny_lm("bert-labels")
    rows = encode(lm, TEXTS)
    plain = [lm.network(torch.tensor([row])).logits.log_softmax(-1) for row in rows]
    assert_close(found := distributions(lm, rows), torch.cat(plain), rtol=1e-4, atol=1e-5)
    assert len(found) == how_many(lm, rows)


@pytest.mark.parametrize("variant", ["t5", "bart"])
def test_an_encoder_decoder_says_how_its_answer_begins(variant: str) -> None:
    lm = tiny_lm(variant)
    rows = encode(lm, TEXTS)
    network: Any = lm.network
    start = torch.tensor([[lm.config.decoder_start_token_id]])
    plain = [
        network(torch.tensor([row]), decoder_input_ids=start).logits[0, -1:].log_softmax(-1)
        for row in rows
    ]
    assert_close(found := distributions(lm, rows), torch.cat(plain), rtol=1e-4, atol=1e-5)
    assert len(found) == how_many(lm, rows)


def test_gradients_flow_and_half_precision_is_widened() -> None:
    lm = tiny_lm("gpt2", dtype=torch.bfloat16)
    found = distributions(lm, encode(lm, TEXTS))
    assert found.dtype == torch.float32 and found.requires_grad
