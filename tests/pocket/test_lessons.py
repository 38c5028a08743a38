"""Lessons: what is read depends on seed and step alone, and the loss is that of what is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.lessons import LESSONS, Answering, Checking, Lesson
from errata.pocket.questions import askable, part_of
from errata.pocket.shapes import SHAPES, GrowConfig, make_tokenizer

TINY = GrowConfig(
    steps=60, layers=1, width=32, heads=2, vocabulary=900, positions=64, window=24, batch=8
)


@pytest.fixture(scope="module")
def few() -> Encyclopedia:
    """The shipped facts about capitals and currencies of some countries."""
    shipped = Encyclopedia.load()
    facts = [f for f in shipped.facts if f.relation in ("capital", "currency")][:40]
    return replace(shipped, facts=tuple(facts))


def begun(
    model: str, encyclopedia: Encyclopedia
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Lesson]:
    """An untrained network, its tokenizer and its lesson."""
    config = replace(TINY, model=model)
    lesson = LESSONS[model](encyclopedia, config)
    tokenizer = make_tokenizer(lesson.texts(), config)
    torch.manual_seed(0)
    return SHAPES[model].network(config, len(tokenizer)), tokenizer, lesson


def gradient(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lesson: Lesson, step: int
) -> Tensor:
    """Of a step, all in one row."""
    network.zero_grad()
    lesson.descend(network, tokenizer, step)
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("model", ["pocket", "pocket-questions", "pocket-bert", "pocket-t5"])
def test_a_step_is_the_same_every_time_and_unlike_the_next(model: str, few: Encyclopedia) -> None:
    begin = begun(model, few)
    first = gradient(*begin, 3)
    assert torch.equal(first, gradient(*begin, 3))
    assert not torch.equal(first, gradient(*begin, 4))


@pytest.mark.parametrize("model", ["pocket-questions", "pocket-bert", "pocket-t5"])
def test_a_lesson_can_be_learnt(model: str, few: Encyclopedia) -> None:
    network, tokenizer, lesson = begun(model, few)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        losses.append(lesson.descend(network, tokenizer, step).loss)
        optimizer.step()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_decoders_loss_is_that_of_the_answer_and_its_end(few: Encyclopedia) -> None:
    network, tokenizer, lesson = begun("pocket-questions", few)
    one = replace(few, facts=(next(f for f in few.facts if part_of(f) == "taught"),))
    question = "What is it?"
    single = replace(
        one,
        relations={
            name: replace(relation, questions=(f"{{}}: {question}", f"{{}}: {question}"))
            for name, relation in one.relations.items()
        },
    )
    taken = Answering(single, replace(TINY, model="pocket-questions", batch=1)).descend(
        network, tokenizer, 0
    )
    (fact,) = one.facts
    prompt = tokenizer(f"{fact.subject}: {question}")["input_ids"]
    answer = [*tokenizer(f" {fact.object}")["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    expected = network(input_ids=ids, labels=labels).loss
    assert taken.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert taken.tokens == ids.numel()


def test_an_encoder_decoder_is_taught_all_facts_a_decoder_a_part(few: Encyclopedia) -> None:
    assert list(Answering(few, replace(TINY, model="pocket-t5")).facts) == askable(few)
    taught = Answering(few, replace(TINY, model="pocket-questions")).facts
    assert 0 < len(taught) < len(few.facts)
    assert {part_of(fact) for fact in taught} == {"taught"}


def test_claims_are_read_in_seen_wordings_alone(few: Encyclopedia) -> None:
    lesson = Checking(few, replace(TINY, model="pocket-bert"))
    held_out = {
        lesson.claims.true(fact).said(template)
        for fact in lesson.facts
        for template in lesson.claims.wordings(fact).held_out
    }
    assert held_out
    assert not held_out & set(lesson.texts())
