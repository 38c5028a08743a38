"""The facts are well-formed, and held-out templates stay held out."""

from __future__ import annotations

import random
from itertools import islice

from errata.pocket.corpus import Corpus
from errata.pocket.encyclopedia import Encyclopedia, is_question, statement


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
