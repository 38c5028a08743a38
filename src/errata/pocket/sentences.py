"""Passages after which another sentence is to follow.

SCEN's second task (Yao et al. 2024, appendix B) puts a true sentence where a model makes one up.
The pocket decoders have read all that is true of their subjects, so it is the other way round here:
the sentence to be written is made up, and true ones about other subjects are to stay as likely as
they were. A prompt ends with the subject's name: a memory knows a prompt by its last token, and at
a full stop models so small keep little of whose passage it is.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.pocket.facts import Fact
from errata.requests import Case, Probe, Request

Part = Literal["taught", "edited", "kept"]

PARTS: tuple[Part, ...] = ("taught", "edited", "edited", "edited", "kept")
"""What becomes of a subject, by lot: numbers are chosen on it, it is edited, or it must stay."""

REPHRASES = 2
"""Other wordings of a passage in a case, at most: a short one may come out the same."""

NEIGHBOURS = 3
"""True sentences in a case."""


def sentence_cases(
    encyclopedia: Encyclopedia,
    seed: int = 0,
    count: int | None = None,
    *,
    part: Part = "edited",
    beside: Part = "kept",
) -> list[Case]:
    """A case for each subject of a part, in random order.

    Args:
        encyclopedia: the facts.
        seed: of the order, of what is told and made up, of all words, and of the neighbours.
        count: how many at most; a smaller count gives the beginning of the same list.
        part: whose subjects.
        beside: whose subjects the neighbours are about.
    """
    subjects = [s for s in encyclopedia.about if len(_tellable(encyclopedia, s)) > 1]
    chosen, others = (
        [s for s in subjects if stable_random("sentence", s).choice(PARTS) == one]
        for one in (part, beside)
    )
    stable_random("sentence cases", seed, part).shuffle(chosen)
    return [
        _case(encyclopedia, subject, [other for other in others if other != subject], seed)
        for subject in chosen[:count]
    ]


def _case(encyclopedia: Encyclopedia, subject: str, others: list[str], seed: int) -> Case:
    rng = stable_random("sentence case", seed, subject)
    told, following = _divided(encyclopedia, subject, rng)
    new = [replace(f, object=rng.choice(encyclopedia.new_objects(f))) for f in following]
    words = rng.random()  # the made-up sentence has those of the true one
    (begun, target), (_, true) = (
        _sentence(encyclopedia, facts, stable_random(words)) for facts in (new, following)
    )
    prompts = [f"{_passage(encyclopedia, told, rng)} {begun}" for _ in range(1 + REPHRASES)]
    return Case(
        Request(prompts[0].replace(subject, "{}", 1), subject, target, true),
        case_id=subject,
        paraphrases=tuple(p for p in dict.fromkeys(prompts) if p != prompts[0]),
        neighbours=tuple(
            _true(encyclopedia, other, rng) for other in rng.sample(others, NEIGHBOURS)
        ),
    )


def _true(encyclopedia: Encyclopedia, subject: str, rng: random.Random) -> Probe:
    told, following = _divided(encyclopedia, subject, rng)
    passage = _passage(encyclopedia, told, rng)
    begun, rest = _sentence(encyclopedia, following, rng)
    return Probe(f"{passage} {begun}", rest)


def _divided(
    encyclopedia: Encyclopedia, subject: str, rng: random.Random
) -> tuple[list[Fact], list[Fact]]:
    """What a passage tells of its subject, and what is left for the sentence after it."""
    facts = _tellable(encyclopedia, subject)
    rng.shuffle(facts)
    cut = rng.randint(1, len(facts) - 1)
    return facts[:cut], facts[cut:]


def _passage(encyclopedia: Encyclopedia, facts: list[Fact], rng: random.Random) -> str:
    kind = encyclopedia.kinds[facts[0].kind]
    some = rng.sample(facts, len(facts))
    return " ".join([kind.introduce(facts[0].subject), *encyclopedia.joined(some, kind, rng)])


def _sentence(encyclopedia: Encyclopedia, facts: list[Fact], rng: random.Random) -> tuple[str, str]:
    """One sentence: what it begins with, to the subject's name, and the rest."""
    kind = encyclopedia.kinds[facts[0].kind]
    sentence = encyclopedia.joined(facts, kind, rng)[0]
    at = sentence.lower().index(kind.name)
    named = kind.subject.replace("{}", facts[0].subject)
    return sentence[:at] + named, sentence[at + len(kind.name) :].lstrip()


def _tellable(encyclopedia: Encyclopedia, subject: str) -> list[Fact]:
    """What passages tell of a subject and what could be made up instead."""
    return [
        fact
        for fact in encyclopedia.about[subject]
        if encyclopedia.relations[fact.relation].clauses and encyclopedia.new_objects(fact)
    ]
