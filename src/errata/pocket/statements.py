"""The benchmark of statements: facts of an encyclopedia with new objects, and how to check them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from errata.pocket.encyclopedia import Encyclopedia, Split, is_question, stable_random
from errata.pocket.facts import Fact


def statement_records(
    encyclopedia: Encyclopedia,
    seed: int = 0,
    count: int | None = None,
    *,
    any_wording: bool = False,
) -> list[dict[str, Any]]:
    """A benchmark from these facts, in CounterFact's own format, spread over the relations.

    Beside CounterFact's keys each case has `same_subject_prompts` (prompt and target: what must
    stay true of the subject) and `reference_texts` (passages about subjects that truly have the
    new object).

    Args:
        encyclopedia: the facts.
        seed: of the order, new objects and templates.
        count: how many at most; if left out, all that have at least four neighbours. A smaller
            count gives the beginning of the same list.
        any_wording: rewrite and paraphrase also with lead-ins ("We read that {} ...") and
            questions. Otherwise the subject begins the sentence, as in most of CounterFact;
            a small model takes a subject in the middle of a sentence for another one, and what
            is written to one carries over to the other only in part.
    """
    rng = stable_random("cases", seed)
    queues: list[list[Fact]] = []
    for name in sorted(encyclopedia.relations):
        facts = [
            fact
            for fact in encyclopedia.facts
            if fact.relation == name and _can_be_a_case(encyclopedia, fact, any_wording)
        ]
        rng.shuffle(facts)
        if facts:
            queues.append(facts)
    order: list[Fact] = []
    while queues:
        order += [queue.pop() for queue in queues]
        queues = [queue for queue in queues if queue]
    return [_case(encyclopedia, i, fact, seed, any_wording) for i, fact in enumerate(order[:count])]


def _neighbours(encyclopedia: Encyclopedia, fact: Fact) -> list[Fact]:
    return [
        f for f in encyclopedia.sharing[fact.relation, fact.object] if f.subject != fact.subject
    ]


def _can_be_a_case(encyclopedia: Encyclopedia, fact: Fact, any_wording: bool) -> bool:
    seen, held_out = _judged(encyclopedia, fact, any_wording)
    return (
        len({f.subject for f in _neighbours(encyclopedia, fact)}) >= 4
        and bool(seen)
        and len(held_out) >= 2
        and bool(encyclopedia.new_objects(fact))
    )


def _judged(encyclopedia: Encyclopedia, fact: Fact, any_wording: bool) -> Split:
    """The templates that a case may rewrite and paraphrase with."""
    seen, held_out = encyclopedia.split(fact)
    statements = tuple(t for t in seen if not is_question(t)) or seen
    if any_wording or not any(
        map(_begins_with_subject, encyclopedia.relations[fact.relation].templates)
    ):
        return Split(statements, held_out)
    return Split(
        tuple(filter(_begins_with_subject, statements)),
        tuple(filter(_begins_with_subject, held_out)),
    )


def _case(
    encyclopedia: Encyclopedia, case_id: int, fact: Fact, seed: int, any_wording: bool
) -> dict[str, Any]:
    rng = stable_random("case", seed, fact.subject, fact.relation)
    statements, held_out = _judged(encyclopedia, fact, any_wording)
    paraphrases = [encyclopedia.prompt(fact, t) for t in held_out[:3]]
    # As in CounterFact, a paraphrase may stand behind a sentence on something else.
    for i in range(1, len(paraphrases), 2):
        if encyclopedia.openings:
            paraphrases[i] = f"{rng.choice(encyclopedia.openings)} {paraphrases[i]}"
    new = rng.choice(encyclopedia.new_objects(fact))
    truly_new = encyclopedia.sharing[fact.relation, new]
    generation = _generation(encyclopedia, fact)
    texts = rng.sample(truly_new, min(len(truly_new), 5))
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": encyclopedia.pinned.get((fact.subject, fact.relation))
            or rng.choice(statements),
            "relation_id": fact.relation,
            "target_new": {"str": new},
            "target_true": {"str": fact.object},
            "subject": fact.subject,
        },
        "paraphrase_prompts": paraphrases,
        "neighborhood_prompts": _prompts(encyclopedia, _neighbours(encyclopedia, fact), 10, rng),
        "attribute_prompts": _prompts(encyclopedia, truly_new, 10, rng),
        "generation_prompts": (generation * 10)[:10],
        "same_subject_prompts": [
            {
                "prompt": encyclopedia.prompt(other, rng.choice(encyclopedia.split(other).seen)),
                "target": other.object,
            }
            for other in encyclopedia.about[fact.subject]
            if other.relation != fact.relation
        ],
        "reference_texts": [encyclopedia.passage(f.subject, rng) for f in texts],
    }


def _generation(encyclopedia: Encyclopedia, fact: Fact) -> list[str]:
    """Beginnings that a model continues with what it knows about the subject.

    Where the model reads passages, a passage's beginning invites one. Beginnings that it never
    read (`generation` of the relations) would measure its imagination.
    """
    kind = encyclopedia.kinds.get(fact.kind)
    if kind is None or not encyclopedia.joins:
        general = encyclopedia.relations[fact.relation].generation or ("{} is", "Who hears of {}")
        return [encyclopedia.prompt(fact, template) for template in general]
    starts = {
        kind.named(join.split("{c1}")[0]).strip()
        for joins in encyclopedia.joins.values()
        for join in joins
    }
    intro = kind.introduce(fact.subject)
    return [intro, *(f"{intro} {start}" for start in sorted(starts))]


def _prompts(
    encyclopedia: Encyclopedia, facts: Sequence[Fact], count: int, rng: random.Random
) -> list[str]:
    """That many different prompts in seen templates, from as many subjects as there are."""
    chosen = rng.sample(facts, min(len(facts), count))
    rounds = [
        rng.sample(encyclopedia.split(f).seen, len(encyclopedia.split(f).seen)) for f in chosen
    ]
    prompts = [
        encyclopedia.prompt(fact, templates[turn])
        for turn in range(max(map(len, rounds), default=0))
        for fact, templates in zip(chosen, rounds, strict=True)
        if turn < len(templates)
    ]
    return prompts[:count]


def _begins_with_subject(template: str) -> bool:
    """Whether the subject stands at the sentence's beginning, with a word of its kind at most."""
    return template.startswith(("{}", "The {}", "The element {}"))
