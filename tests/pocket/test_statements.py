"""The benchmark of statements is CounterFact's in form, and true to the encyclopedia."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from errata.pocket.encyclopedia import Encyclopedia, is_question
from errata.pocket.statements import statement_records


@pytest.fixture(scope="module")
def cases(shipped: Encyclopedia) -> list[dict[str, Any]]:
    return statement_records(shipped)


def test_there_are_enough_cases_of_many_relations(cases: list[dict[str, Any]]) -> None:
    assert len(cases) >= 500
    relations = Counter(case["requested_rewrite"]["relation_id"] for case in cases[:200])
    assert len(relations) >= 15
    assert max(relations.values()) <= 20


def test_cases_are_the_same_every_time(shipped: Encyclopedia, cases: list[dict[str, Any]]) -> None:
    assert statement_records(shipped, count=50) == cases[:50]
    assert statement_records(shipped, seed=1, count=50) != cases[:50]


def test_cases_are_in_counterfacts_format(
    shipped: Encyclopedia, cases: list[dict[str, Any]]
) -> None:
    truth = {(fact.subject, fact.relation): fact for fact in shipped.facts}
    for case in cases:
        rewrite = case["requested_rewrite"]
        fact = truth[rewrite["subject"], rewrite["relation_id"]]
        split = shipped.split(fact)
        new = rewrite["target_new"]["str"]
        assert rewrite["target_true"]["str"] == fact.object != new
        assert rewrite["prompt"] in split.seen
        assert not is_question(rewrite["prompt"])
        assert len(case["paraphrase_prompts"]) >= 2
        held_out = tuple(shipped.prompt(fact, t) for t in split.held_out)  # perhaps with an opening
        assert all(prompt.endswith(held_out) for prompt in case["paraphrase_prompts"])
        assert len(set(case["neighborhood_prompts"])) == 10
        assert len(set(case["attribute_prompts"])) == 10
        assert len(case["generation_prompts"]) == 10
        assert all(fact.subject in prompt for prompt in case["generation_prompts"])
        for key, object_ in (("neighborhood_prompts", fact.object), ("attribute_prompts", new)):
            true = {
                shipped.prompt(other, template): other.subject
                for other in shipped.sharing[fact.relation, object_]
                if other.subject != fact.subject
                for template in shipped.split(other).seen
            }
            assert set(case[key]) <= set(true)
            if key == "neighborhood_prompts":
                assert len({true[prompt] for prompt in case[key]}) >= 4
        same = {other.object for other in shipped.about[fact.subject]}
        assert all(probe["target"] in same for probe in case["same_subject_prompts"])
        assert case["reference_texts"]
        assert all(new in text for text in case["reference_texts"])


def test_most_new_objects_begin_differently(cases: list[dict[str, Any]]) -> None:
    same = [
        case
        for case in cases
        for rewrite in [case["requested_rewrite"]]
        if rewrite["target_new"]["str"].split()[0] == rewrite["target_true"]["str"].split()[0]
    ]
    assert len(same) < 0.02 * len(cases)
