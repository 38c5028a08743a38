"""Sentences to follow a passage: made up of some subjects, true of others, in the same words."""

from __future__ import annotations

import pytest

from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.sentences import NEIGHBOURS, PARTS, REPHRASES, sentence_cases
from errata.requests import Case


@pytest.fixture(scope="module")
def cases(shipped: Encyclopedia) -> list[Case]:
    return sentence_cases(shipped)


def test_a_case_makes_up_what_the_true_sentence_says(
    shipped: Encyclopedia, cases: list[Case]
) -> None:
    assert len(cases) > 200
    for case in cases:
        request = case.request
        facts = shipped.about[request.subject]
        assert request.true and request.text.endswith(request.subject)
        told = {f.object for f in facts if f.object in request.text.rpartition(".")[0]}
        true = {f.object for f in facts if f.object in request.true}
        assert told and true
        assert request.true.endswith(".") and request.target.endswith(".")
        assert request.target.split()[0] == request.true.split()[0]
        assert request.target != request.true


def test_passages_come_in_other_words_and_the_sentence_begins_as_it_did(cases: list[Case]) -> None:
    for case in cases:
        beginning = case.request.text.rpartition(". ")[2]
        assert len(case.paraphrases) <= REPHRASES
        assert case.request.text not in case.paraphrases
        assert len(set(case.paraphrases)) == len(case.paraphrases)
        assert all(text.rpartition(". ")[2] == beginning for text in case.paraphrases)
    assert sum(len(case.paraphrases) == REPHRASES for case in cases) > 0.9 * len(cases)


def test_what_must_stay_is_about_nobody_who_is_edited_or_learnt_from(
    shipped: Encyclopedia, cases: list[Case]
) -> None:
    parts = {part: sentence_cases(shipped, part=part) for part in dict.fromkeys(PARTS)}
    names = {part: {case.request.subject for case in some} for part, some in parts.items()}
    assert parts["edited"] == cases
    total = sum(map(len, names.values()))
    assert len(set.union(*names.values())) == total > 400
    for part in names:
        assert abs(len(names[part]) / total - PARTS.count(part) / len(PARTS)) < 0.05
    for case in (*cases, *parts["taught"]):
        assert len({probe.prompt for probe in case.neighbours}) == NEIGHBOURS
        for probe in case.neighbours:
            assert any(probe.prompt.endswith(name) for name in names["kept"])


def test_what_is_learnt_from_may_stand_beside_what_is_learnt_from(shipped: Encyclopedia) -> None:
    taught = sentence_cases(shipped, part="taught", beside="taught")
    names = {case.request.subject for case in taught}
    for case in taught:
        about = [
            next(name for name in names if probe.prompt.endswith(name)) for probe in case.neighbours
        ]
        assert len(about) == NEIGHBOURS and case.request.subject not in about


def test_the_same_seed_gives_the_same_cases(shipped: Encyclopedia, cases: list[Case]) -> None:
    assert sentence_cases(shipped, count=20) == cases[:20]
    assert sentence_cases(shipped, seed=1, count=20) != cases[:20]
