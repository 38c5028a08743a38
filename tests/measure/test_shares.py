"""The share of the possible: formulas by hand, probabilities against the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata.lm.load import LanguageModel
from errata.measure.shares import (
    Question,
    asked,
    case_probabilities,
    erased,
    kept,
    probabilities,
    recovered,
    shares,
)
from errata.requests import Case, Probe, Request
from tests.conftest import TEMPLATES

CASE = Case(
    Request(TEMPLATES[0], "France", "Lima", "Paris"),
    paraphrases=(TEMPLATES[1].format("France"), "unread"),
    neighbours=(Probe(TEMPLATES[0].format("Peru"), "Lima"),),
)


@pytest.mark.parametrize(
    ("before", "after", "score"),
    [(0.0, 0.5, 0.5), (0.5, 0.75, 0.5), (0.5, 0.25, 0.0), (0.2, 1.0, 1.0), (1.0, 1.0, 0.0)],
)
def test_recovered_is_the_share_of_the_possible(before: float, after: float, score: float) -> None:
    assert recovered(before, after) == pytest.approx(score)
    if after < 1:
        assert recovered(before, after) == pytest.approx(
            max(0.0, 1 - (1 - after) / (1 - before)) if before < 1 else 0.0
        )


@pytest.mark.parametrize(
    ("before", "after", "score"), [(0.8, 0.2, 0.75), (0.8, 0.0, 1.0), (0.2, 0.3, 0.0), (0, 0, 0)]
)
def test_erased_is_the_share_that_is_gone(before: float, after: float, score: float) -> None:
    assert erased(before, after) == pytest.approx(score)


@pytest.mark.parametrize(
    ("before", "after", "score"),
    [(0.9, 0.9, 1.0), (0.9, 0.0, 0.0), (0.1, 1.0, 0.0), (0.5, 0.75, 0.5), (0.0, 1.0, 0.0)],
)
def test_kept_is_none_where_it_moved_as_far_as_it_could(
    before: float, after: float, score: float
) -> None:
    assert kept(before, after) == pytest.approx(score)


def test_overall_is_the_harmonic_mean_of_a_case() -> None:
    before = {"rewrite": 0.0, "paraphrases": 0.0, "neighbours": 0.5}
    found = shares(CASE.request, before, {"rewrite": 0.8, "paraphrases": 0.4, "neighbours": 0.5})
    assert found["S"] == pytest.approx(3 / (1 / 0.8 + 1 / 0.4 + 1 / 1.0))
    nothing = shares(CASE.request, before, before)
    assert nothing == {"rewrite": 0, "paraphrases": 0, "neighbours": 1, "S": 0}
    assert "S" not in shares(CASE.request, {"rewrite": 0.1}, {"rewrite": 0.2})
    gone = CASE.request.posed("fact-erasure")
    assert shares(gone, {"rewrite": 0.8}, {"rewrite": 0.2})["rewrite"] == pytest.approx(0.75)


def test_probabilities_are_products_over_tokens(trained_folder: Path) -> None:
    lm = LanguageModel.load(trained_folder)
    text = CASE.request.text
    known, other = probabilities(lm, [Question(text, "Paris"), Question(text, "Lima")])
    assert known > 0.5 > other
    one, two = probabilities(lm, [Question(text, "Paris"), Question(text, "Paris. The")])
    (rest,) = probabilities(lm, [Question(f"{text} Paris.", "The")])
    (dot,) = probabilities(lm, [Question(text, "Paris.")])
    assert one > two and two == pytest.approx(dot * rest, rel=1e-3)
    (found,) = case_probabilities(lm, [CASE])
    assert found["rewrite"] == pytest.approx(other, rel=1e-4) and found["neighbours"] > 0.5


def test_noise_hides_the_subject_of_rewrites_and_paraphrases_not_of_neighbours() -> None:
    forced = Case(CASE.request.posed("fact-forcing"), "", "", CASE.paraphrases, CASE.neighbours)
    found = asked(forced)
    assert found["paraphrases"].veiled is not None
    assert found["paraphrases"].veiled.prompt == TEMPLATES[1]
    assert found["rewrite"].veiled == forced.request and found["neighbours"].veiled is None
    assert found["neighbours"].target == "Paris"
    unnamed = Case(forced.request, paraphrases=("The capital of that country is",))
    assert "paraphrases" not in asked(unnamed)
    assert asked(CASE)["paraphrases"] == Question(CASE.paraphrases[0], "Lima")
