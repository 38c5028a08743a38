"""Texts as vectors: the mean of states, of length 1, in any order and any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from errata.errors import ModelLoadError, NotFiniteError
from errata.lm import sentences
from errata.lm.sentences import SentenceEncoder, own_vectors
from errata.lm.tokens import encode
from tests.lm.families import tiny_lm

TEXTS = ["Rome", "The capital of Italy is Rome.", "Rivers flow to the sea."]


@pytest.fixture(params=["bert", "t5", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    lm = tiny_lm(request.param)
    lm.network.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("variant", ["gpt2", "opt", "bert", "bert-labels", "t5", "bart"])
def test_own_vectors_are_means_of_the_last_states_that_read(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm(variant)
    rows = encode(lm, TEXTS)
    found = own_vectors(lm, rows)
    plain = []
    for row in rows:
        reader = lm.network.get_encoder() if lm.kind == "encoder-decoder" else lm.network
        # Of decoders and encoder-decoders the last of these is normed, so take the block's own.
        kept: list[torch.Tensor] = []
        last = 2 if lm.kind == "encoder-decoder" else -1
        handle = lm.block(last).register_forward_hook(
            lambda _m, _a, output, kept=kept: kept.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        reader(torch.tensor([row]))
        handle.remove()
        plain.append(normalize(kept[0].reshape(len(row), -1), dim=1).mean(dim=0))
    assert_close(found, normalize(torch.stack(plain), dim=1), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sentences, "BATCH_TOKENS", 4)
    assert_close(own_vectors(lm, rows), found, rtol=1e-4, atol=1e-5)


def test_a_sentence_encoder_is_loaded_by_name(folder: Path) -> None:
    encoder = SentenceEncoder.load(folder)
    found = encoder(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor(encoder.tokenizer([text])["input_ids"])
        states = encoder.network(input_ids=ids).last_hidden_state[0]
        assert_close(vector, normalize(states.mean(dim=0), dim=0), rtol=1e-4, atol=1e-5)
    assert_close(found.norm(dim=1), torch.ones(3))


def test_long_texts_are_cut(folder: Path) -> None:
    encoder = SentenceEncoder.load(folder)
    encoder.tokenizer.model_max_length = 6
    long = encoder(["The capital of Italy is Rome. " * 50])
    assert long.shape[0] == 1


def test_what_cannot_be_loaded_or_is_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot load the sentence encoder"):
        SentenceEncoder.load(tmp_path)
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        lm.mlp_in(0).weight[0, 0] = float("nan")  # type: ignore[operator]
    with pytest.raises(NotFiniteError, match="tiny-gpt2 gives states"):
        own_vectors(lm, encode(lm, TEXTS))
