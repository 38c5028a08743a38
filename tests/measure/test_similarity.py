"""How alike texts are: 1 for the same, symmetric where the formula is, BERTScore as published."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from errata.errors import ConfigError
from errata.lm.sentences import SentenceEncoder
from errata.measure.similarity import MEASURES, Measure, bert_score, similarities
from tests.lm.families import tiny_lm

TEXTS = ["Rome", "The capital of Italy is Rome.", "Rivers flow to the sea."]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    folder = tmp_path_factory.mktemp("encoder")
    lm = tiny_lm("bert")
    lm.network.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return SentenceEncoder.load(folder)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_text_is_like_itself_and_less_like_others(
    encoder: SentenceEncoder, measure: Measure
) -> None:
    same = similarities(encoder, TEXTS, TEXTS, measure)
    assert same == pytest.approx([1, 1, 1], abs=1e-5)
    others = similarities(encoder, TEXTS, [*TEXTS[1:], TEXTS[0]], measure)
    assert all(value < 0.999 for value in others)
    assert similarities(encoder, [*TEXTS[1:], TEXTS[0]], TEXTS, measure) == pytest.approx(
        others, abs=1e-5
    )
    assert similarities(encoder, [], [], measure) == []


def test_bertscore_is_greedy_matching_by_hand() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    between = normalize(torch.tensor([1.0, 1.0]), dim=0)
    # P: east -> between; R: between -> east, north -> nothing.
    found = bert_score(torch.stack([east]), torch.stack([between, north]))
    precision, recall = 0.5**0.5, (0.5**0.5 + 0) / 2
    assert found == pytest.approx(2 * precision * recall / (precision + recall))
    assert bert_score(torch.stack([east]), torch.stack([north])) == 0
    assert bert_score(torch.empty(0, 2), torch.stack([north])) == 0


def test_token_states_leave_special_tokens_out(encoder: SentenceEncoder) -> None:
    for text, states in zip(TEXTS, encoder.tokens(TEXTS), strict=True):
        ids = encoder.tokenizer([text])["input_ids"][0]
        assert len(states) == len(ids) - 2
        whole = encoder.network(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:-1]
        torch.testing.assert_close(states, normalize(whole, dim=1).detach(), atol=1e-5, rtol=1e-4)


def test_an_unknown_measure_is_refused(encoder: SentenceEncoder) -> None:
    with pytest.raises(ConfigError, match="sentence or bertscore"):
        similarities(encoder, TEXTS, TEXTS, "rouge")  # type: ignore[arg-type]
