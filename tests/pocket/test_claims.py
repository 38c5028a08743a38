"""Claims: true ones and false ones that no other fact makes true, and cases that flip a label."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from errata.pocket.claims import NEIGHBOURS, REFUTES, SUPPORTS, Claims
from errata.pocket.encyclopedia import Encyclopedia, is_question, statement
from errata.requests import Case


@pytest.fixture(scope="module")
def claims() -> Claims:
    return Claims(Encyclopedia.load())


@pytest.fixture(scope="module")
def cases(claims: Claims) -> list[Case]:
    return claims.cases()


def test_only_relations_with_one_object_a_subject_are_claimed(claims: Claims) -> None:
    relations = claims.encyclopedia.relations
    claimed = {fact.relation for fact in claims.facts}
    assert claimed == {name for name, relation in relations.items() if relation.single}
    assert not {"borders", "occupation", "official_language"} & claimed


def test_a_false_claim_has_the_object_of_another_of_its_kind(claims: Claims) -> None:
    rng = random.Random(0)
    objects: Counter[str] = Counter()
    for fact in claims.facts:
        claim = claims.false(fact, rng)
        assert claim.object != fact.object
        assert (claim.label, claim.flipped) == (REFUTES, SUPPORTS)
        assert any(
            (other.relation, other.kind, other.object) == (fact.relation, fact.kind, claim.object)
            for other in claims.facts
        )
        objects[claim.object] += 1
    # Drawn as often as it is true: English, which many speak, more often than any other language.
    spoken = {fact.object for fact in claims.facts if fact.relation == "native_language"}
    assert max(spoken, key=objects.__getitem__) == "English"


def test_a_claim_is_a_statement_in_words_that_are_no_question(claims: Claims) -> None:
    for fact in claims.facts:
        split, wordings = claims.encyclopedia.split(fact), claims.wordings(fact)
        assert wordings.seen
        assert wordings.held_out
        assert set(wordings.seen) <= set(split.seen)
        assert set(wordings.held_out) <= set(split.held_out)
        assert not any(map(is_question, (*wordings.seen, *wordings.held_out)))
        template = wordings.seen[0]
        assert claims.true(fact).said(template) == statement(fact, template) + "."
        assert claims.true(fact).label == SUPPORTS


def test_cases_flip_labels_by_a_fair_coin(cases: list[Case]) -> None:
    assert len(cases) > 1000
    flipped = Counter(case.request.target for case in cases)
    assert abs(flipped[SUPPORTS] / len(cases) - 0.5) < 0.05
    for case in cases:
        assert {case.request.target, case.request.true} == {SUPPORTS, REFUTES}
        assert case.request.text.endswith(".")
        assert len(case.neighbours) == NEIGHBOURS


def test_paraphrases_claim_the_same_and_neighbours_keep_the_truth(
    claims: Claims, cases: list[Case]
) -> None:
    facts = {(fact.subject, fact.relation): fact for fact in claims.facts}
    true = {
        claims.true(fact).said(template)
        for fact in claims.facts
        for template in claims.wordings(fact).seen
    }
    for case in cases:
        fact = facts[case.request.subject, case.relation]
        wordings = claims.wordings(fact)
        assert len(case.paraphrases) == len(wordings.seen) + len(wordings.held_out) - 1
        said = {case.request.text, *case.paraphrases}
        assert all((text in true) <= (case.request.true == SUPPORTS) for text in said)
        for probe in (*case.neighbours, *case.same_subject):
            assert (probe.prompt in true) == (probe.answer == SUPPORTS)


def test_the_same_seed_gives_the_same_cases(claims: Claims, cases: list[Case]) -> None:
    assert claims.cases(count=20) == cases[:20]
    assert claims.cases(seed=1, count=20) != cases[:20]
