"""Noise on subjects: the same as tracing's, in its place alone, and the same for whoever asks."""

from __future__ import annotations

import pytest
import torch

from errata.errors import ConfigError
from errata.lm.generate import complete, complete_hidden
from errata.lm.hooks import captured
from errata.lm.load import LanguageModel
from errata.lm.noise import NOISE, Hidden, Noise, embedding_spread, hidden, subjects_hidden
from errata.lm.tokens import encode_requests, pad
from errata.locate.tracing import trace
from errata.measure.shares import Question, probabilities
from errata.requests import Request
from tests.lm.families import tiny_lm as family

FORCED = Request("The river {} flows to", "Danube", "sea", "sea", "fact-forcing")
CLEAR = Request("Vienna lies on the {}", "Danube", "sea")


def test_noise_stands_on_the_subject_alone(tiny_lm: LanguageModel) -> None:
    rows = encode_requests(tiny_lm, [CLEAR, FORCED])
    veils = hidden(tiny_lm, [CLEAR, FORCED], rows, draw=3)
    assert veils[0] is None and veils[1] is not None
    batch = pad(tiny_lm, [row.ids for row in rows])
    embedded = []
    for some in ([None, None], veils):
        with subjects_hidden(tiny_lm, some), captured({0: tiny_lm.embedding}, "output") as seen:
            tiny_lm.network(input_ids=batch.ids, attention_mask=batch.mask)
        embedded.append(seen.outputs[0].detach())
    added = embedded[1] - embedded[0]
    inside = slice(rows[1].subject_first, rows[1].subject_last + 1)
    wanted = NOISE.draw(inside.stop - inside.start, added.shape[2])[3] * 3
    wanted *= embedding_spread(tiny_lm, ["Danube"])
    torch.testing.assert_close(
        added[1, inside].double(), torch.tensor(wanted), rtol=1e-3, atol=1e-4
    )
    added[1, inside] = 0
    assert not added.any()


def test_what_is_judged_behind_noise_is_what_tracing_corrupts(tiny_lm: LanguageModel) -> None:
    (found,) = probabilities(tiny_lm, [Question(FORCED.text, FORCED.target, FORCED)])
    traced = trace(tiny_lm, FORCED, kind="mlp", window=9, answer="sea")
    assert found == pytest.approx(traced.corrupted, rel=1e-4)


def test_noise_may_take_the_embeddings_place_and_begins_anew(tiny_gpt2: LanguageModel) -> None:
    (row,) = encode_requests(tiny_gpt2, [FORCED])
    noise = Noise(0.5, "absolute", replace=True, samples=2)
    first, third = (Hidden.of(tiny_gpt2, FORCED, row, draw=d, noise=noise) for d in (0, 2))
    assert torch.equal(first.values(32), third.values(32)) and first.level == 0.5
    with subjects_hidden(tiny_gpt2, [first]), captured({0: tiny_gpt2.embedding}, "output") as seen:
        tiny_gpt2.network(input_ids=pad(tiny_gpt2, [row.ids]).ids)
    there = seen.outputs[0][0, row.subject_first : row.subject_last + 1].detach().double()
    torch.testing.assert_close(there, first.values(32), rtol=1e-5, atol=1e-6)


def test_writing_behind_no_noise_is_writing(tiny_lm: LanguageModel) -> None:
    none = Noise(1e-9)
    said = complete_hidden(tiny_lm, [FORCED, CLEAR], new_tokens=6, noise=none)
    assert said == complete(tiny_lm, [FORCED.text, CLEAR.text], new_tokens=6)
    assert complete_hidden(tiny_lm, [CLEAR], new_tokens=6) != said[1:]


def test_only_decoders_have_hidden_subjects() -> None:
    lm = family("bert")
    rows = encode_requests(lm, [FORCED], target=False)
    with pytest.raises(ConfigError, match="fact-forcing"):
        hidden(lm, [FORCED], rows)
