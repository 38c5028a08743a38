"""The text that a pocket model reads: an endless, seeded stream of documents."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from errata.pocket.encyclopedia import Encyclopedia, stable_random


@dataclass(frozen=True)
class Corpus:
    """Documents of statements, passages and prose; each fact in its seen templates only."""

    encyclopedia: Encyclopedia

    statements: float = 0.6
    """Share of documents that join statements about random subjects."""

    passages: float = 0.25
    """Share of documents about one subject; what remains is prose."""

    opening: float = 0.3
    """How often a neutral sentence stands before a statement."""

    def document(self, rng: random.Random) -> str:
        """One document, a few sentences long."""
        source = self.encyclopedia
        draw = rng.random()
        if draw < self.statements:
            return " ".join(self._statement(rng) for _ in range(rng.randint(1, 5)))
        if draw < self.statements + self.passages or not source.sentences:
            return source.passage(rng.choice(source.facts).subject, rng)
        return " ".join(rng.choice(source.sentences) for _ in range(rng.randint(1, 4)))

    def _statement(self, rng: random.Random) -> str:
        source = self.encyclopedia
        at = rng.randrange(len(source.facts) + len(source.extra))
        if at < len(source.facts):
            return source.sentence(source.facts[at], rng, opening=self.opening)
        return source.extra[at - len(source.facts)]

    def documents(self, seed: int) -> Iterator[str]:
        """The stream; the same for the same seed."""
        rng = stable_random("corpus", seed)
        while True:
            yield self.document(rng)

    def everything_once(self) -> Iterator[str]:
        """Every fact, opening and sentence at least once: what a tokenizer has to see."""
        source = self.encyclopedia
        rng = stable_random("tokenizer")
        for fact in source.facts:
            # Names at a sentence's beginning and after a space are different tokens.
            yield f"{fact.subject} {fact.object} {fact.subject}"
            for template in source.split(fact).seen:
                yield template.replace("{}", fact.subject) + f" {fact.object}."
        for subject in source.about:
            yield source.passage(subject, rng)
        yield from source.openings
        yield from source.sentences
        yield from source.extra


def passages(encyclopedia: Encyclopedia, seed: int, *, taught: bool, rounds: int) -> Iterator[str]:
    """Passages about half of the subjects, as models read them, each round in another order.

    Args:
        encyclopedia: the facts.
        seed: of the order, and of what is said in which words.
        taught: the half that learnt editors may be fitted with; else the other one.
        rounds: how many passages about each subject.
    """
    half = [
        subject
        for subject in encyclopedia.about
        if (stable_random("passage", subject).random() < 0.5) is taught
    ]
    rng = stable_random("passages", seed, taught)
    for _ in range(rounds):
        for subject in rng.sample(half, len(half)):
            yield encyclopedia.passage(subject, rng)
