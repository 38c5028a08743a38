"""The facts are well-formed, held-out templates stay held out, and cases are CounterFact's."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from errata.errors import FactFileError
from errata.pocket.corpus import Corpus
from errata.pocket.encyclopedia import Encyclopedia, is_question, statement
from errata.pocket.statements import statement_records

COUNTERFACT = {
    "case_id": 1,
    "requested_rewrite": {
        "prompt": "{} is located in",
        "relation_id": "P30",
        "target_new": {"str": "Asia", "id": "Q48"},
        "target_true": {"str": "Africa", "id": "Q15"},
        "subject": "Angola",
    },
    "paraphrase_prompts": ["Angola belongs to"],
    "neighborhood_prompts": ["Ghana is located in", "On a map, Kenya is in"],
    "attribute_prompts": ["Japan is located in"],
    "generation_prompts": ["People around Angola"],
}


@pytest.fixture(scope="module")
def cases(shipped: Encyclopedia) -> list[dict[str, Any]]:
    return statement_records(shipped)


def test_there_are_enough_facts_with_many_a_subject(shipped: Encyclopedia) -> None:
    assert len(shipped.facts) >= 2000
    assert len({fact.relation for fact in shipped.facts}) >= 20
    rich = [subject for subject, facts in shipped.about.items() if len(facts) >= 4]
    assert len(rich) > 0.9 * len(shipped.about)


def test_every_relation_has_enough_different_templates(shipped: Encyclopedia) -> None:
    for relation in shipped.relations.values():
        assert len(relation.templates) >= 6
        assert any(map(is_question, relation.templates))
        assert relation.clauses
        assert relation.generation


def test_a_third_of_the_templates_is_held_out(shipped: Encyclopedia) -> None:
    for fact in shipped.facts:
        seen, held_out = shipped.split(fact)
        templates = shipped.relations[fact.relation].templates
        assert sorted((*seen, *held_out)) == sorted(templates)
        assert len(held_out) == len(templates) // 3
        assert any(map(is_question, seen))
        assert not all(map(is_question, seen))


def test_the_split_differs_between_facts_but_not_between_runs(shipped: Encyclopedia) -> None:
    again = Encyclopedia.load()
    assert all(shipped.split(fact) == again.split(fact) for fact in shipped.facts)
    capitals = [fact for fact in shipped.facts if fact.relation == "capital"]
    assert len({shipped.split(fact).held_out for fact in capitals}) > 20


def test_nothing_held_out_is_ever_read(shipped: Encyclopedia) -> None:
    # A statement and its subject must stand in one document, so it is enough to look there.
    held: dict[str, list[str]] = {}
    for fact in shipped.facts:
        for template in shipped.split(fact).held_out:
            held.setdefault(fact.subject, []).append(statement(fact, template))
    documents = [
        *islice(Corpus(shipped).documents(0), 1500),
        *Corpus(shipped).everything_once(),
        *shipped.statements(words=20_000).splitlines(),
    ]
    for document in documents:
        for subject, statements in held.items():
            if subject in document:
                assert not [said for said in statements if said in document]


def test_the_corpus_is_a_function_of_its_seed(shipped: Encyclopedia) -> None:
    corpus = Corpus(shipped)
    first = list(islice(corpus.documents(3), 50))
    assert first == list(islice(corpus.documents(3), 50))
    assert first != list(islice(corpus.documents(4), 50))


def test_a_passage_says_every_fact_of_its_subject(shipped: Encyclopedia) -> None:
    for subject in ("France", "hydrogen", "Rhine"):
        text = shipped.passage(subject, random.Random(0))
        assert all(fact.object in text for fact in shipped.about[subject])
        assert "{" not in text


def test_statements_are_one_document_a_line(shipped: Encyclopedia) -> None:
    text = shipped.statements(seed=1, words=5000)
    assert text == shipped.statements(seed=1, words=5000)
    assert 5000 <= len(text.split()) < 5300
    assert all(line.endswith(".") for line in text.splitlines())


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


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_fact_file_may_carry_its_own_templates(tmp_path: Path) -> None:
    relation = {"relation": "colour", "templates": ["The colour of {} is", "{} looks"]}
    fact = {"subject": "grass", "kind": "plant", "facts": {"colour": "green"}}
    found = Encyclopedia.read(write(tmp_path / "facts.jsonl", fact, relation))
    assert [statement(f, "{} looks") for f in found.facts] == ["grass looks green"]
    assert found.passage("grass", random.Random(0)).endswith("green.")


def test_templates_may_come_from_another_file(tmp_path: Path) -> None:
    toml = tmp_path / "relations.toml"
    toml.write_text('[colour]\ntemplates = ["The colour of {} is"]\n', encoding="utf-8")
    facts = write(tmp_path / "facts.jsonl", {"subject": "snow", "facts": {"colour": "white"}})
    assert Encyclopedia.read(facts, toml).relations["colour"].templates == ("The colour of {} is",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (['{"subject": "x", "facts": {}}', "[]"], "line 2 is no fact"),
        (['{"subject": "", "facts": {"capital": "y"}}'], "line 1: `subject`"),
        (['{"subject": "x", "facts": {"capital": 3}}'], "line 1: the capital of 'x'"),
        (['{"subject": "x", "facts": {"hue": "red"}}'], "no templates for hue"),
        (['{"subject": "x", "facts": {"capital": "y"}}'] * 2, "line 2: subject 'x' was on line 1"),
        (['{"relation": "r", "templates": ["no slot"]}'], "exactly one {}"),
        ([""], "there is no fact"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(FactFileError) as error:
        Encyclopedia.read(path)
    assert message in str(error.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FactFileError, match="cannot read"):
        Encyclopedia.read(tmp_path / "absent.jsonl")


def test_counterfact_cases_are_facts_with_their_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([COUNTERFACT]), encoding="utf-8")
    found = Encyclopedia.read(path)
    told = {fact.subject: fact.object for fact in found.facts}
    assert told == {"Angola": "Africa", "Ghana": "Africa", "Japan": "Asia"}
    assert found.extra == ("On a map, Kenya is in Africa.",)
    assert found.split(found.facts[0]).seen == ("{} is located in",)


def test_compact_counterfact_is_read_too(tmp_path: Path) -> None:
    row = {
        "case_id": 0,
        "prompt": "The mother tongue of Danielle Darrieux is",
        "target_new": "English",
        "subject": "Danielle Darrieux",
        "ground_truth": "French",
        "locality_prompt": "The mother tongue of Michel Rocard is",
        "locality_ground_truth": "French",
    }
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    found = Encyclopedia.read(path)
    assert {fact.subject for fact in found.facts} == {"Danielle Darrieux", "Michel Rocard"}
    path.write_text(json.dumps([row | {"subject": "Rocard"}]), encoding="utf-8")
    with pytest.raises(FactFileError, match="record 1"):
        Encyclopedia.read(path)


def test_published_counterfact_can_be_grown(shared: Path) -> None:
    found = Encyclopedia.read(shared / "data" / "counterfact" / "counterfact_500.json")
    assert len(found.facts) > 1000
    assert next(Corpus(found).documents(0))
    assert statement_records(found, count=5)
