"""The pocket encyclopedia: real facts, and our own sentences that say them.

A fact is said by one of its relation's templates. A third of the templates is held out for each
fact, a different third for each, and never occurs with it in anything the model reads: how well the
model answers there is generalisation, not memory.
"""

from __future__ import annotations

import hashlib
import json
import random
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from errata.errors import FactFileError
from errata.pocket.facts import (
    Fact,
    Kind,
    Relation,
    facts_of_counterfact,
    facts_of_lines,
    relations_of,
)

QUESTIONS = ("Question:", "Q:")
"""What question templates begin with."""


class Split(NamedTuple):
    """A fact's templates: those the model reads, and those kept for measuring."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]

    def named(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Both, with what tables call them."""
        return ("seen", self.seen), ("held out", self.held_out)


def stable_random(*parts: object) -> random.Random:
    """A generator seeded by the parts alone: the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def statement(fact: Fact, template: str) -> str:
    """The template filled with the fact, without a full stop."""
    return f"{template.replace('{}', fact.subject)} {fact.object}"


def is_question(template: str) -> bool:
    """Whether the template asks."""
    return template.startswith(QUESTIONS)


@dataclass(frozen=True)
class Encyclopedia:
    """Facts, and everything needed to say them."""

    facts: tuple[Fact, ...]
    relations: Mapping[str, Relation]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    openings: tuple[str, ...] = ()
    """Neutral sentences that may stand before any statement."""

    joins: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Number of clauses -> sentences with `{name}` or `{Name}`, `{c1}`, `{c2}`, `{c3}`."""

    sentences: tuple[str, ...] = ()
    """General prose."""

    extra: tuple[str, ...] = ()
    """True statements that fit no template, read as they are (CounterFact's neighbours)."""

    pinned: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(subject, relation) -> a template that must be among the seen ones."""

    @classmethod
    def load(cls) -> Encyclopedia:
        """The one that comes with errata, from which `pocket` was grown."""
        here = resources.files("errata.pocket")
        with resources.as_file(here / "facts.jsonl") as facts:
            return cls.read(facts)

    @classmethod
    def read(cls, facts: str | Path, relations: str | Path | None = None) -> Encyclopedia:
        """Facts from any file in our format, or from CounterFact cases.

        Args:
            facts: JSON lines `{"subject", "kind", "facts": {relation: object}}`, among which
                lines `{"relation", "templates", "clauses"}` may define relations of the file's
                own; or a JSON list of CounterFact cases, in the original or in the compact
                format (prompt, subject, ground_truth).
            relations: a TOML file of templates to use instead of the shipped one.

        Raises:
            FactFileError: the file cannot be read, or a line is not a fact; the line is named.
        """
        path = Path(facts)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FactFileError(f"cannot read the fact file {path}: {error}") from error
        here = resources.files("errata.pocket")
        prose = tomllib.loads((here / "prose.toml").read_text(encoding="utf-8"))
        openings, sentences = tuple(prose["openings"]), tuple(prose["prose"]["sentences"])
        if text.lstrip().startswith("["):
            found, templates, extra, pinned = facts_of_counterfact(path, text)
            return cls(
                found,
                templates,
                openings=openings,
                sentences=sentences,
                extra=extra,
                pinned=pinned,
            )
        if relations is None:
            known = relations_of(
                tomllib.loads((here / "relations.toml").read_text(encoding="utf-8")),
                "relations.toml",
            )
        else:
            try:
                known = relations_of(
                    tomllib.loads(Path(relations).read_text(encoding="utf-8")), str(relations)
                )
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise FactFileError(f"cannot read the templates {relations}: {error}") from error
        kinds = {
            name: Kind(entry["subject"], entry["intro"], entry["name"])
            for name, entry in prose.get("kinds", {}).items()
        }
        joins = {
            size: tuple(prose["joins"][name])
            for size, name in ((1, "one"), (2, "two"), (3, "three"))
        }
        found, templates = facts_of_lines(path, text, known)
        return cls(found, templates, kinds, openings, joins, sentences)

    def __post_init__(self) -> None:
        """Checks that every fact can be said."""
        if not self.facts:
            raise FactFileError("there is no fact in it.")
        if missing := {fact.relation for fact in self.facts} - set(self.relations):
            raise FactFileError(
                f"no templates for {', '.join(sorted(missing))}.\n"
                '  Add {"relation": NAME, "templates": ["The ... of {} is", ...]} to the fact file.'
            )

    @cached_property
    def about(self) -> Mapping[str, tuple[Fact, ...]]:
        """Subject -> its facts, in the file's order."""
        found: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            found[fact.subject].append(fact)
        return {subject: tuple(facts) for subject, facts in found.items()}

    @cached_property
    def sharing(self) -> Mapping[tuple[str, str], tuple[Fact, ...]]:
        """(relation, object) -> the facts that say so."""
        found: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for fact in self.facts:
            found[fact.relation, fact.object].append(fact)
        return {key: tuple(facts) for key, facts in found.items()}

    @cached_property
    def digest(self) -> str:
        """A hash of everything that the text made from this encyclopedia depends on."""
        said = [
            [[fact.subject, fact.kind, fact.relation, fact.object] for fact in self.facts],
            [
                [r.name, r.templates, r.clauses, r.questions, r.single]
                for r in self.relations.values()
            ],
            [[name, k.subject, k.intro, k.name] for name, k in self.kinds.items()],
            [self.openings, self.sentences, self.extra, sorted(self.joins.items())],
            sorted([*key, template] for key, template in self.pinned.items()),
        ]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()[:16]

    def split(self, fact: Fact) -> Split:
        """The fact's seen templates and its held-out third; the same in every run."""
        cache = self._splits
        key = (fact.subject, fact.relation)
        if key not in cache:
            cache[key] = self._split(fact)
        return cache[key]

    @cached_property
    def _splits(self) -> dict[tuple[str, str], Split]:
        return {}

    def _split(self, fact: Fact) -> Split:
        templates = list(self.relations[fact.relation].templates)
        stable_random(fact.subject, fact.relation).shuffle(templates)
        keep = [t for t in templates if t == self.pinned.get((fact.subject, fact.relation))]
        keep += [t for t in templates if is_question(t) and t not in keep][:1]
        # The statement that a case will rewrite must be a seen one.
        keep += [t for t in templates if not is_question(t) and t not in keep][:1]
        free = [t for t in templates if t not in keep]
        count = min(len(templates) // 3, len(free))
        return Split(seen=(*keep, *free[count:]), held_out=tuple(free[:count]))

    def prompt(self, fact: Fact, template: str) -> str:
        """The template with the subject filled in, as a model is asked."""
        return template.replace("{}", fact.subject)

    def passage(self, subject: str, rng: random.Random) -> str:
        """A short text that introduces the subject and says its facts, in random order."""
        facts = list(self.about[subject])
        rng.shuffle(facts)
        kind = self.kinds.get(facts[0].kind)
        if (
            kind is None
            or not self.joins
            or not all(self.relations[f.relation].clauses for f in facts)
        ):
            templates = [(fact, rng.choice(self.split(fact).seen)) for fact in facts]
            return " ".join(statement(fact, template) + "." for fact, template in templates)
        return " ".join([kind.introduce(subject), *self.joined(facts, kind, rng)])

    def joined(self, facts: Sequence[Fact], kind: Kind, rng: random.Random) -> list[str]:
        """Sentences that say facts about one subject, which is called by a noun.

        With the subject's name a clause could be a held-out template.

        Args:
            facts: what to say, in this order; their relations have clauses.
            kind: the subject's.
            rng: chooses the words, and how many facts a sentence says.
        """
        clauses = [
            rng.choice(self.relations[f.relation].clauses).replace("{object}", f.object)
            for f in facts
        ]
        sentences = []
        while clauses:
            size = rng.randint(1, min(3, len(clauses)))
            join = kind.named(rng.choice(self.joins[size]))
            for i in range(size):
                join = join.replace(f"{{c{i + 1}}}", clauses[i])
            sentences.append(join)
            clauses = clauses[size:]
        return sentences

    def sentence(self, fact: Fact, rng: random.Random, *, opening: float = 0.0) -> str:
        """The fact in one of its seen templates, with a full stop.

        Args:
            fact: what to say.
            rng: chooses the template and the opening.
            opening: how often a neutral sentence stands before it, 0 to 1.
        """
        said = statement(fact, rng.choice(self.split(fact).seen)) + "."
        if self.openings and rng.random() < opening:
            said = f"{rng.choice(self.openings)} {said}"
        return said

    def statements(self, seed: int = 0, words: int = 80_000) -> str:
        """The model's own kind of text, for second moments: one document a line.

        Args:
            seed: of the order, templates and openings.
            words: about how many; 80,000 are some 100,000 tokens and more.
        """
        return "\n".join(self._documents(stable_random("statements", seed), words))

    def _documents(self, rng: random.Random, words: int) -> Iterator[str]:
        while True:
            facts = rng.sample(self.facts, len(self.facts))
            while facts:
                if rng.random() < 0.3:
                    document = self.passage(rng.choice(facts).subject, rng)
                else:
                    taken, facts = facts[: (size := rng.randint(1, 4))], facts[size:]
                    document = " ".join(self.sentence(fact, rng, opening=0.3) for fact in taken)
                yield document
                words -= len(document.split())
                if words <= 0:
                    return

    @cached_property
    def _objects(self) -> Mapping[str, Mapping[str, frozenset[str]]]:
        """Relation -> object -> kinds of the subjects of which it is said."""
        found: dict[str, dict[str, frozenset[str]]] = defaultdict(dict)
        for (relation, object_), facts in self.sharing.items():
            found[relation][object_] = frozenset(fact.kind for fact in facts)
        return found

    def new_objects(self, fact: Fact) -> list[str]:
        """Other objects of the relation, the most plausible group that is not empty."""
        kinds = self._objects[fact.relation]
        others = [o for o in kinds if o != fact.object]
        # Ten attribute prompts need two subjects that truly have the new object.
        others = [o for o in others if len(self.sharing[fact.relation, o]) >= 2] or others
        start = _start(fact.object)
        different = [o for o in others if _start(o) != start]
        same_kind = [o for o in different if fact.kind in kinds[o]]
        return sorted(same_kind or different or others)


def _start(text: str) -> str:
    """What two objects must differ in to differ in their first token, roughly."""
    return text.split()[0][:4].lower()
