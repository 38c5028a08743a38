"""Claims about the encyclopedia's facts, true and false, and the cases that flip their labels.

A claim is a statement of a fact or of the same with another object of its relation, as in FEVER's
fact checking: SUPPORTS or REFUTES. Only relations of which a subject has one object alone are
claimed: of the others (whom does a country border?) another object might be true as well.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from errata.pocket.encyclopedia import Encyclopedia, Split, is_question, stable_random
from errata.pocket.facts import Fact
from errata.requests import Case, Probe, Request

REFUTES, SUPPORTS = LABELS = ("REFUTES", "SUPPORTS")
"""What a claim can be, in the order of a classifier's logits; FEVER's words."""

NEIGHBOURS = 10
"""Other claims in a case; half of them are of the same relation, where there are so many."""


@dataclass(frozen=True)
class Claim:
    """A fact's subject and relation with an object, its own or another."""

    fact: Fact
    object: str

    @property
    def label(self) -> str:
        """Whether the encyclopedia says so."""
        return SUPPORTS if self.object == self.fact.object else REFUTES

    @property
    def flipped(self) -> str:
        """The other label."""
        return REFUTES if self.label == SUPPORTS else SUPPORTS

    def said(self, template: str) -> str:
        """The claim as a sentence."""
        return f"{template.replace('{}', self.fact.subject)} {self.object}."


class Claims:
    """The claims that can be made about an encyclopedia."""

    def __init__(self, encyclopedia: Encyclopedia) -> None:
        """Sorts out which facts can be claimed."""
        self.encyclopedia = encyclopedia
        groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for fact in encyclopedia.facts:
            if encyclopedia.relations[fact.relation].single and self.wordings(fact).held_out:
                groups[fact.relation, fact.kind].append(fact)
        self._groups: Mapping[tuple[str, str], Sequence[Fact]] = groups
        self.facts = tuple(
            fact
            for group in groups.values()
            for fact in group
            if any(other.object != fact.object for other in group)
        )
        """Those whose relation has one object a subject, of which there are different ones."""

    def wordings(self, fact: Fact) -> Split:
        """The fact's templates without questions: those that are read, and those that are not."""
        seen, held_out = self.encyclopedia.split(fact)
        return Split(
            tuple(template for template in seen if not is_question(template)),
            tuple(template for template in held_out if not is_question(template)),
        )

    def true(self, fact: Fact) -> Claim:
        """What the encyclopedia says."""
        return Claim(fact, fact.object)

    def false(self, fact: Fact, rng: random.Random) -> Claim:
        """The object of another subject of its kind, each as often as it is truly one.

        An object that many subjects have is then no sign of truth.
        """
        while True:
            other = rng.choice(self._groups[fact.relation, fact.kind])
            if other.object != fact.object:
                return Claim(fact, other.object)

    def draw(self, fact: Fact, rng: random.Random) -> Claim:
        """A true or a false one, by a fair coin."""
        return self.true(fact) if rng.random() < 0.5 else self.false(fact, rng)

    def cases(self, seed: int = 0, count: int | None = None) -> list[Case]:
        """Claims whose label is to be flipped, in random order: one of each fact.

        The paraphrases are the statement's other wordings, those first that were never read with
        this fact. Neighbours are claims about other subjects, each with the label that must stay.

        Args:
            seed: of the order, the claims, the wordings and the neighbours.
            count: how many at most; a smaller count gives the beginning of the same list.
        """
        facts = list(self.facts)
        stable_random("claims", seed).shuffle(facts)
        return [self._case(fact, seed) for fact in facts[:count]]

    def _case(self, fact: Fact, seed: int) -> Case:
        rng = stable_random("claim", seed, fact.subject, fact.relation)
        claim = self.draw(fact, rng)
        seen, held_out = self.wordings(fact)
        wording = rng.choice(seen)
        others = [*held_out, *(template for template in seen if template != wording)]
        return Case(
            Request(f"{wording} {claim.object}.", fact.subject, claim.flipped, claim.label),
            case_id=f"{fact.subject} | {fact.relation}",
            relation=fact.relation,
            paraphrases=tuple(claim.said(template) for template in others),
            neighbours=tuple(self._probe(other, rng) for other in self._others(fact, rng)),
            same_subject=tuple(
                self._probe(other, rng)
                for other in self.facts
                if other.subject == fact.subject and other != fact
            ),
        )

    def _others(self, fact: Fact, rng: random.Random) -> list[Fact]:
        others = [other for other in self.facts if other.subject != fact.subject]
        near = [other for other in others if other.relation == fact.relation]
        far = [other for other in others if other.relation != fact.relation]
        chosen = rng.sample(near, min(len(near), NEIGHBOURS // 2))
        return chosen + rng.sample(far, min(len(far), NEIGHBOURS - len(chosen)))

    def _probe(self, fact: Fact, rng: random.Random) -> Probe:
        claim = self.draw(fact, rng)
        return Probe(claim.said(rng.choice(self.wordings(fact).seen)), claim.label)
