"""Questions: every fact in one part, a wording kept from each, cases that can be judged."""

from __future__ import annotations

import pytest

from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.questions import (
    NEIGHBOURS,
    PARTS,
    REPHRASES,
    askable,
    asked,
    facts_of,
    part_of,
    question_cases,
)
from errata.requests import Case


@pytest.fixture(scope="module")
def cases(shipped: Encyclopedia) -> list[Case]:
    return question_cases(shipped)


def test_every_relation_is_asked_after_in_its_own_words(shipped: Encyclopedia) -> None:
    questions = [q for relation in shipped.relations.values() for q in relation.questions]
    assert len(questions) == len(set(questions)) == 5 * len(shipped.relations)
    assert all(q.endswith("?") and q.count("{}") == 1 for q in questions)
    templates = {t for relation in shipped.relations.values() for t in relation.templates}
    assert not templates & set(questions)


def test_the_parts_divide_the_facts_as_told(shipped: Encyclopedia) -> None:
    parts = {part: facts_of(shipped, part) for part in PARTS}
    assert sum(map(len, parts.values())) == len(askable(shipped)) == len(shipped.facts)
    for part, share in PARTS.items():
        assert abs(len(parts[part]) / len(shipped.facts) - share) < 0.03
        assert {fact.relation for fact in parts[part]} == set(shipped.relations)


def test_one_wording_is_kept_from_each_fact_but_none_from_all(shipped: Encyclopedia) -> None:
    seen, held_out = set(), set()
    for fact in askable(shipped):
        split = asked(shipped, fact)
        assert split == asked(shipped, fact)
        assert set(split.seen) | set(split.held_out) == set(
            shipped.relations[fact.relation].questions
        )
        assert len(split.held_out) == 1
        assert len(split.seen) == 4
        seen |= set(split.seen)
        held_out |= set(split.held_out)
    assert seen == held_out == {q for r in shipped.relations.values() for q in r.questions}


def test_cases_ask_for_another_answer_and_keep_the_rest(
    shipped: Encyclopedia, cases: list[Case]
) -> None:
    assert len(cases) > 1000
    truth = {(fact.subject, fact.relation): fact for fact in shipped.facts}
    kept = {
        shipped.prompt(fact, question): fact
        for fact in facts_of(shipped, "kept")
        for question in asked(shipped, fact).seen
    }
    for case in cases:
        fact = truth[case.request.subject, case.relation]
        split = asked(shipped, fact)
        assert part_of(fact) == "edited"
        assert case.request.true == fact.object != case.request.target
        assert case.request.prompt in split.seen
        assert len(set(case.paraphrases)) == REPHRASES
        assert case.paraphrases[0] == shipped.prompt(fact, split.held_out[0])
        assert case.request.text not in case.paraphrases
        assert len(case.neighbours) == NEIGHBOURS
        assert all(kept[probe.prompt].object == probe.answer for probe in case.neighbours)
        assert fact.subject not in {kept[probe.prompt].subject for probe in case.neighbours}
        assert {kept[probe.prompt].subject for probe in case.same_subject} <= {fact.subject}


def test_half_of_the_neighbours_ask_the_same_where_there_are_enough(
    shipped: Encyclopedia, cases: list[Case]
) -> None:
    relation = {
        shipped.prompt(fact, question): fact.relation
        for fact in facts_of(shipped, "kept")
        for question in asked(shipped, fact).seen
    }
    kept = facts_of(shipped, "kept")
    for case in cases[:100]:
        near = sum(relation[probe.prompt] == case.relation for probe in case.neighbours)
        others = {fact.subject for fact in kept if fact.relation == case.relation}
        assert near == min(len(others - {case.request.subject}), NEIGHBOURS // 2)


def test_the_same_seed_gives_the_same_cases(shipped: Encyclopedia, cases: list[Case]) -> None:
    assert question_cases(shipped, count=20) == cases[:20]
    assert question_cases(shipped, seed=1, count=20) != cases[:20]
    taught = question_cases(shipped, part="taught")
    assert not {case.case_id for case in taught} & {case.case_id for case in cases}
