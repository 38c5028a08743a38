from __future__ import annotations

import math
from statistics import harmonic_mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.errors import DatasetError
from errata.measure import metrics


def test_success_counts_only_answers_strictly_likelier_than_their_rival() -> None:
    assert metrics.success([1.0, 2.0, 3.0, 1.0], [2.0, 1.0, 3.0, 1.5]) == 0.5


def test_magnitude_is_the_difference_of_probabilities() -> None:
    answer, rival = [math.log(2), math.log(4)], [math.log(4), math.log(4)]
    assert metrics.magnitude(answer, rival) == pytest.approx((0.25 + 0) / 2)


def test_token_accuracy_counts_tokens_and_answer_accuracy_whole_answers() -> None:
    hits = [[True, True, True], [False]]
    assert metrics.token_accuracy(hits) == 0.75
    assert metrics.answer_accuracy(hits) == 0.5


@pytest.mark.parametrize(
    ("text", "answer", "says"),
    [
        (" Rome. It lies", "Rome", True),
        (" Rome", " Rome ", True),
        (" Romeo and Juliet", "Rome", False),
        (" the city of Rome", "Rome", False),
        (" Washington D.C. is", "Washington D.C.", True),
        (" C++, of course", "C++", True),
        ("", "Rome", False),
    ],
)
def test_a_reader_reads_the_answer(text: str, answer: str, says: bool) -> None:
    assert metrics.reads(text, answer) is says


TOLD = (
    "Rome, of course",
    "Romeo and Juliet",
    "New York 's",
    "do not",
    "São Paulo",
    " Rome",
    "R",
    "",
)


@pytest.mark.parametrize("text", TOLD)
@pytest.mark.parametrize("answer", ["Rome", "New York", "do", "São", "Romeo and", "Lima"])
def test_the_beginning_of_a_text_tells_nothing_that_the_whole_denies(
    text: str, answer: str
) -> None:
    whole = metrics.reads(text, answer)
    assert metrics.reads_already(text, answer, ended=True) is whole
    known = [metrics.reads_already(text[:n], answer, ended=False) for n in range(len(text) + 1)]
    assert set(known) <= {None, whole} and known[0] is None
    first = next((n for n, told in enumerate(known) if told is not None), len(known))
    # Once told it stays told, and what cannot become the answer is told at once.
    assert None not in known[first:]
    if text and text.strip()[0] != answer[0]:
        assert known[-1] is False


def test_half_a_letter_tells_nothing_yet() -> None:
    assert metrics.reads_already("S\ufffd", "São", ended=False) is None
    assert metrics.reads_already("Rome\ufffd", "Rome", ended=False) is None


def test_fluency_of_distinct_words_is_the_logarithm_of_their_number() -> None:
    words = " ".join(f"w{i}" for i in range(18))  # 17 bigrams, 16 trigrams, all different
    assert metrics.fluency([words]) == pytest.approx(math.log2(17) / 3 + 2 * math.log2(16) / 3)


def test_fluency_of_repetition_is_low_and_of_nothing_zero() -> None:
    assert metrics.fluency(["the the the the the the"]) == 0
    assert metrics.fluency(["", "word"]) == 0
    assert metrics.fluency(["a b a b a b a b"]) < metrics.fluency(["a b c d e f g h"])


def test_words_are_nltks() -> None:
    assert metrics.tokenize("It's here. He said: \"don't!\"") == [
        "It", "'s", "here", ".", "He", "said", ":", "``", "do", "n't", "!", "''",
    ]  # fmt: skip


def test_consistency_is_a_cosine() -> None:
    rome, tech = "Rome is a city in Italy", "Intel makes processors"
    consistency = metrics.Consistency([rome, tech])
    assert consistency([rome], [rome]) == pytest.approx(1)
    assert consistency([rome], [tech]) == 0
    assert consistency(["unknown words"], [tech]) == 0
    assert 0 < consistency(["Rome makes processors"], [tech]) < 1
    with pytest.raises(DatasetError, match="reference texts"):
        metrics.Consistency(["...", ""])


def test_harmonic_mean() -> None:
    assert metrics.harmonic_interval([[1, 0.5, 0.25]], seed=0).mean == pytest.approx(3 / 7)
    assert metrics.harmonic_interval([[1, 0, 1]], seed=0).mean == 0


def test_interval_of_a_proportion_is_wilsons() -> None:
    estimate = metrics.interval([1.0] * 10)
    assert (estimate.mean, estimate.n) == (1, 10)
    assert estimate.high == pytest.approx(1)
    assert estimate.low == pytest.approx(0.7225, abs=1e-4)  # the textbook's value for 10 of 10
    half = metrics.interval([0.0] * 50 + [1.0] * 50)
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = [0.1, 0.4, 0.3, 0.9]
    estimate = metrics.interval(values)
    half = 1.96 * np.std(values, ddof=1) / 2
    assert estimate[:3] == pytest.approx((0.425, 0.425 - half, 0.425 + half), rel=1e-4)
    assert metrics.interval([0.5, 1.0], within=(0, 1)).high == 1
    alone = metrics.interval([0.5], within=(0, 1))
    assert alone.mean == 0.5 and math.isnan(alone.low) and math.isnan(alone.high)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    mean, low, high, n = metrics.interval(values)
    assert n == len(values)
    assert math.isnan(low) or low - 1e-12 <= mean <= high + 1e-12


def test_harmonic_interval_is_seeded_and_uses_the_means() -> None:
    columns = np.random.default_rng(0).random((40, 3))
    columns[3, 1] = math.nan  # a case without paraphrases still counts for the rest
    estimate = metrics.harmonic_interval(columns, seed=1)
    assert estimate.mean == pytest.approx(harmonic_mean(np.nanmean(columns, 0).tolist()))
    assert estimate.low < estimate.mean < estimate.high
    assert estimate == metrics.harmonic_interval(columns, seed=1)
    assert estimate != metrics.harmonic_interval(columns, seed=2)


def test_harmonic_interval_of_a_score_that_is_zero() -> None:
    assert metrics.harmonic_interval([[1, 0, 1], [1, 0, 1]], seed=0) == (0, 0, 0, 2)
    assert math.isnan(metrics.harmonic_interval([[1, 1, 1]], seed=0).low)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, covered = harmonic_mean([0.9, 0.6, 0.8]), 0
    for trial in range(100):
        columns = (rng.random((60, 3)) < [0.9, 0.6, 0.8]).astype(float)
        estimate = metrics.harmonic_interval(columns, seed=trial, resamples=300)
        covered += estimate.low <= truth <= estimate.high
    assert 88 <= covered <= 100
