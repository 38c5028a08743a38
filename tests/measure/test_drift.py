from __future__ import annotations

import math

import pytest
import torch

from errata.errors import NotFiniteError, RequestError
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode
from errata.lm.weights import weight_out_in
from errata.measure.drift import drift, observe

PROMPTS = ["The capital of Italy is", "Vienna lies on", "Hamlet", "The capital of Italy is"]
TEXTS = ["The Nile flows to the Mediterranean Sea, the Rhine to the North Sea.", "Rome.", ""]


def nudge_(lm: LanguageModel) -> None:
    with torch.no_grad():
        weight = weight_out_in(lm.mlp_out(1))
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain(lm: LanguageModel, text: str) -> torch.Tensor:
    """(tokens, vocab) log-probabilities in float64, one text at a time."""
    ids = torch.tensor(encode(lm, [text]))
    logits: torch.Tensor = lm.network(input_ids=ids).logits
    return logits[0].double().log_softmax(-1)


def test_an_unchanged_model_does_not_drift(tiny_lm: LanguageModel) -> None:
    moved = drift(tiny_lm, observe(tiny_lm, PROMPTS, TEXTS))
    assert moved.prompts and moved.texts
    assert moved.prompts.mean == pytest.approx(0, abs=1e-6)
    assert moved.texts.mean == pytest.approx(0, abs=1e-6)
    assert moved.perplexity_before == moved.perplexity_after


@pytest.mark.parametrize("batch_tokens", [1, 20, 1024])
def test_drift_is_the_plain_divergence(tiny_lm: LanguageModel, batch_tokens: int) -> None:
    texts = TEXTS[:2]
    base = {text: plain(tiny_lm, text) for text in PROMPTS + texts}
    before = observe(tiny_lm, PROMPTS, texts, batch_tokens=batch_tokens)
    nudge_(tiny_lm)
    edited = {text: plain(tiny_lm, text) for text in PROMPTS + texts}
    moved = drift(tiny_lm, before, batch_tokens=batch_tokens)
    kl = {text: (base[text].exp() * (base[text] - edited[text])).sum(-1) for text in base}
    assert moved.prompts and moved.texts and moved.perplexity_before and moved.perplexity_after
    assert moved.prompts.n == 3  # equal prompts count once
    expected = sum(float(kl[prompt][-1]) for prompt in set(PROMPTS)) / 3
    assert moved.prompts.mean == pytest.approx(expected, abs=1e-5)
    inside = torch.cat([kl[text][:-1] for text in texts])
    assert moved.texts.mean == pytest.approx(float(inside.mean()), abs=1e-5)
    assert moved.texts.n == len(inside)
    for perplexity, model in ((moved.perplexity_before, base), (moved.perplexity_after, edited)):
        ids = [encode(tiny_lm, [text])[0] for text in texts]
        nll = [
            -model[t][i, row[i + 1]]
            for t, row in zip(texts, ids, strict=True)
            for i in range(len(row) - 1)
        ]
        assert perplexity.mean == pytest.approx(math.exp(sum(map(float, nll)) / len(nll)), rel=1e-5)


def test_memory_is_bounded_and_the_sample_is_seeded(tiny_gpt2: LanguageModel) -> None:
    full = observe(tiny_gpt2, PROMPTS, TEXTS)
    small = observe(tiny_gpt2, PROMPTS, TEXTS, limit=2, seed=3)
    again = observe(tiny_gpt2, PROMPTS, TEXTS, limit=2, seed=3)
    assert small.nbytes < full.nbytes
    assert small.distributions.shape == (4, 384)
    assert torch.equal(small.distributions, again.distributions)
    assert torch.allclose(small.nll[2:], full.nll[3:], atol=1e-5)  # every token's probability stays
    nudge_(tiny_gpt2)
    moved = drift(tiny_gpt2, small)
    assert moved.prompts and moved.texts and moved.prompts.n == moved.texts.n == 2


def test_long_texts_are_cut_into_windows(tiny_gpt2: LanguageModel) -> None:
    text = "The Nile flows to the sea. " * 100
    assert {len(w) for w in observe(tiny_gpt2, [], [text]).texts[:-1]} == {tiny_gpt2.max_length}
    assert {len(w) for w in observe(tiny_gpt2, [], [text], window=10).texts[:-1]} == {10}


def test_only_what_was_observed_is_reported(tiny_gpt2: LanguageModel) -> None:
    assert set(drift(tiny_gpt2, observe(tiny_gpt2, PROMPTS, [])).summary()) == {"KL neighbours"}
    assert set(drift(tiny_gpt2, observe(tiny_gpt2, [], TEXTS)).summary()) == {
        "KL text",
        "perplexity before",
        "perplexity after",
    }
    with pytest.raises(RequestError, match="there are none"):
        observe(tiny_gpt2, [], [""])


def test_nan_is_not_reported_as_drift(tiny_gpt2: LanguageModel) -> None:
    before = observe(tiny_gpt2, PROMPTS, [])
    with torch.no_grad():
        weight_out_in(tiny_gpt2.mlp_out(1))[0, 0] = math.nan
    with pytest.raises(NotFiniteError):
        drift(tiny_gpt2, before)
