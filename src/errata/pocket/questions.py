"""Questions about the encyclopedia's facts, and the cases that edit the answers to them.

The facts are divided in three, the same way every time. Those of `taught` are what a decoder is
tuned on, and what learnt editors may be fitted with; those of `edited` get new answers; those of
`kept` are never edited: their answers must stay. (SCEN, appendix A: D_train, D_edit, D_loc.)
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from errata.pocket.encyclopedia import Encyclopedia, Split, stable_random
from errata.pocket.facts import Fact
from errata.requests import Case, Probe, Request

Part = Literal["taught", "edited", "kept"]

PARTS: Mapping[Part, float] = {"taught": 0.3, "edited": 0.5, "kept": 0.2}
"""The parts that the facts are divided into, and the share of each."""

REPHRASES = 3
"""Other wordings of a question in a case (SCEN's Generality asks three)."""

NEIGHBOURS = 10
"""Other questions in a case; half of them ask the same of other subjects, where there are any."""


def part_of(fact: Fact) -> Part:
    """Which part a fact belongs to; of the fact alone."""
    draw = stable_random("part", fact.subject, fact.relation).random()
    for part, share in PARTS.items():
        if draw < share:
            return part
        draw -= share
    return "kept"


def facts_of(encyclopedia: Encyclopedia, part: Part) -> list[Fact]:
    """The facts of a part that can be asked after, in the encyclopedia's order."""
    return [fact for fact in askable(encyclopedia) if part_of(fact) == part]


def askable(encyclopedia: Encyclopedia) -> list[Fact]:
    """The facts whose relation has at least two questions."""
    return [f for f in encyclopedia.facts if len(encyclopedia.relations[f.relation].questions) > 1]


def asked(encyclopedia: Encyclopedia, fact: Fact) -> Split:
    """A fact's questions: those that models are grown on, and one that is kept from them.

    Which one is kept differs from fact to fact, so that every wording occurs with other subjects.
    """
    questions = list(encyclopedia.relations[fact.relation].questions)
    stable_random("question", fact.subject, fact.relation).shuffle(questions)
    return Split(seen=tuple(questions[1:]), held_out=tuple(questions[:1]))


def question_cases(
    encyclopedia: Encyclopedia, seed: int = 0, count: int | None = None, *, part: Part = "edited"
) -> list[Case]:
    """Questions with new answers, in random order.

    The rephrased questions begin with the one that models never saw with this fact. Neighbours are
    questions about facts of the part `kept`, each with the answer that must stay.

    Args:
        encyclopedia: the facts.
        seed: of the order, the new answers, the wordings and the neighbours.
        count: how many at most; a smaller count gives the beginning of the same list.
        part: which facts get new answers.
    """
    kept: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts_of(encyclopedia, "kept"):
        kept[fact.relation].append(fact)
    facts = [f for f in facts_of(encyclopedia, part) if encyclopedia.new_objects(f)]
    stable_random("question cases", seed, part).shuffle(facts)
    return [_case(encyclopedia, fact, kept, seed) for fact in facts[:count]]


def _case(
    encyclopedia: Encyclopedia, fact: Fact, kept: Mapping[str, Sequence[Fact]], seed: int
) -> Case:
    rng = stable_random("question case", seed, fact.subject, fact.relation)
    seen, held_out = asked(encyclopedia, fact)
    wording = rng.choice(seen)
    rephrased = [*held_out, *(question for question in seen if question != wording)][:REPHRASES]
    new = rng.choice(encyclopedia.new_objects(fact))
    return Case(
        Request(wording, fact.subject, new, fact.object),
        case_id=f"{fact.subject} | {fact.relation}",
        relation=fact.relation,
        paraphrases=tuple(encyclopedia.prompt(fact, question) for question in rephrased),
        neighbours=tuple(_probe(encyclopedia, f, rng) for f in _neighbours(fact, kept, rng)),
        same_subject=tuple(
            _probe(encyclopedia, other, rng)
            for facts in kept.values()
            for other in facts
            if other.subject == fact.subject and other.relation != fact.relation
        ),
    )


def _neighbours(fact: Fact, kept: Mapping[str, Sequence[Fact]], rng: random.Random) -> list[Fact]:
    """Other subjects' facts: of the same relation for up to half of them, then of any other."""
    near, far = (
        [
            other
            for relation, facts in kept.items()
            if (relation == fact.relation) is same
            for other in facts
            if other.subject != fact.subject
        ]
        for same in (True, False)
    )
    chosen = rng.sample(near, min(len(near), NEIGHBOURS // 2))
    return chosen + rng.sample(far, min(len(far), NEIGHBOURS - len(chosen)))


def _probe(encyclopedia: Encyclopedia, fact: Fact, rng: random.Random) -> Probe:
    question = rng.choice(asked(encyclopedia, fact).seen)
    return Probe(encyclopedia.prompt(fact, question), fact.object)
