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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from errata.errors import FactFileError

QUESTIONS = ("Question:", "Q:")
"""What question templates begin with."""


@dataclass(frozen=True)
class Fact:
    """One true triple, e.g. France, capital, Paris."""

    subject: str
    kind: str
    """What the subject is, e.g. `country`."""

    relation: str
    object: str


@dataclass(frozen=True)
class Relation:
    """How a relation is said."""

    name: str
    templates: tuple[str, ...]
    """Each has one `{}` for the subject; the object follows after one space."""

    clauses: tuple[str, ...] = ()
    """For passages: what follows a noun that names the subject, with `{object}`."""

    generation: tuple[str, ...] = ()
    """Beginnings of free text, with `{}`, that do not ask for the object at once."""

    questions: tuple[str, ...] = ()
    """Whole questions, with `{}`; the answer follows after one space."""

    single: bool = False
    """Whether a subject has one object only, so that a statement with another one is false."""


@dataclass(frozen=True)
class Kind:
    """How subjects of a kind are introduced, and spoken of afterwards."""

    subject: str
    """How a passage names the subject, e.g. `The {}`."""

    intro: str
    """What it says first, e.g. `is a river`."""

    name: str
    """What it calls the subject from then on, e.g. `the river`."""

    def introduce(self, subject: str) -> str:
        """A passage's first sentence."""
        return f"{_capital(self.subject.replace('{}', subject))} {self.intro}."


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


def begins_with_subject(template: str) -> bool:
    """Whether the subject stands at the sentence's beginning, with a word of its kind at most."""
    return template.startswith(("{}", "The {}", "The element {}"))


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
            found, templates, extra, pinned = _from_counterfact(path, text)
            return cls(
                found,
                templates,
                openings=openings,
                sentences=sentences,
                extra=extra,
                pinned=pinned,
            )
        if relations is None:
            known = _relations(
                tomllib.loads((here / "relations.toml").read_text(encoding="utf-8")),
                "relations.toml",
            )
        else:
            try:
                known = _relations(
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
        found, templates = _from_lines(path, text, known)
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
            join = _named(rng.choice(self.joins[size]), kind)
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

    def cases(
        self, seed: int = 0, count: int | None = None, *, any_wording: bool = False
    ) -> list[dict[str, Any]]:
        """A benchmark from these facts, in CounterFact's own format, spread over the relations.

        Beside CounterFact's keys each case has `same_subject_prompts` (prompt and target: what must
        stay true of the subject) and `reference_texts` (passages about subjects that truly have the
        new object).

        Args:
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
        for name in sorted(self.relations):
            facts = [
                fact
                for fact in self.facts
                if fact.relation == name and self._can_be_a_case(fact, any_wording)
            ]
            rng.shuffle(facts)
            if facts:
                queues.append(facts)
        order: list[Fact] = []
        while queues:
            order += [queue.pop() for queue in queues]
            queues = [queue for queue in queues if queue]
        return [self._case(i, fact, seed, any_wording) for i, fact in enumerate(order[:count])]

    def _neighbours(self, fact: Fact) -> list[Fact]:
        return [f for f in self.sharing[fact.relation, fact.object] if f.subject != fact.subject]

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

    def _can_be_a_case(self, fact: Fact, any_wording: bool) -> bool:
        seen, held_out = self._judged(fact, any_wording)
        return (
            len({f.subject for f in self._neighbours(fact)}) >= 4
            and bool(seen)
            and len(held_out) >= 2
            and bool(self.new_objects(fact))
        )

    def _judged(self, fact: Fact, any_wording: bool) -> Split:
        """The templates that a case may rewrite and paraphrase with."""
        seen, held_out = self.split(fact)
        statements = tuple(t for t in seen if not is_question(t)) or seen
        if any_wording or not any(
            map(begins_with_subject, self.relations[fact.relation].templates)
        ):
            return Split(statements, held_out)
        return Split(
            tuple(filter(begins_with_subject, statements)),
            tuple(filter(begins_with_subject, held_out)),
        )

    def _case(self, case_id: int, fact: Fact, seed: int, any_wording: bool) -> dict[str, Any]:
        rng = stable_random("case", seed, fact.subject, fact.relation)
        statements, held_out = self._judged(fact, any_wording)
        paraphrases = [self.prompt(fact, t) for t in held_out[:3]]
        # As in CounterFact, a paraphrase may stand behind a sentence on something else.
        for i in range(1, len(paraphrases), 2):
            if self.openings:
                paraphrases[i] = f"{rng.choice(self.openings)} {paraphrases[i]}"
        new = rng.choice(self.new_objects(fact))
        truly_new = self.sharing[fact.relation, new]
        generation = self._generation(fact)
        texts = rng.sample(truly_new, min(len(truly_new), 5))
        return {
            "case_id": case_id,
            "requested_rewrite": {
                "prompt": self.pinned.get((fact.subject, fact.relation)) or rng.choice(statements),
                "relation_id": fact.relation,
                "target_new": {"str": new},
                "target_true": {"str": fact.object},
                "subject": fact.subject,
            },
            "paraphrase_prompts": paraphrases,
            "neighborhood_prompts": self._prompts(self._neighbours(fact), 10, rng),
            "attribute_prompts": self._prompts(truly_new, 10, rng),
            "generation_prompts": (generation * 10)[:10],
            "same_subject_prompts": [
                {
                    "prompt": self.prompt(other, rng.choice(self.split(other).seen)),
                    "target": other.object,
                }
                for other in self.about[fact.subject]
                if other.relation != fact.relation
            ],
            "reference_texts": [self.passage(f.subject, rng) for f in texts],
        }

    def _generation(self, fact: Fact) -> list[str]:
        """Beginnings that a model continues with what it knows about the subject.

        Where the model reads passages, a passage's beginning invites one. Beginnings that it never
        read (`generation` of the relations) would measure its imagination.
        """
        kind = self.kinds.get(fact.kind)
        if kind is None or not self.joins:
            general = self.relations[fact.relation].generation or ("{} is", "Who hears of {}")
            return [self.prompt(fact, template) for template in general]
        starts = {
            _named(join.split("{c1}")[0], kind).strip()
            for joins in self.joins.values()
            for join in joins
        }
        intro = kind.introduce(fact.subject)
        return [intro, *(f"{intro} {start}" for start in sorted(starts))]

    def _prompts(self, facts: Sequence[Fact], count: int, rng: random.Random) -> list[str]:
        """That many different prompts in seen templates, from as many subjects as there are."""
        chosen = rng.sample(facts, min(len(facts), count))
        rounds = [rng.sample(self.split(f).seen, len(self.split(f).seen)) for f in chosen]
        prompts = [
            self.prompt(fact, templates[turn])
            for turn in range(max(map(len, rounds), default=0))
            for fact, templates in zip(chosen, rounds, strict=True)
            if turn < len(templates)
        ]
        return prompts[:count]


def _strings(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _relation(name: str, entry: Any, where: str) -> Relation:
    templates = entry.get("templates") if isinstance(entry, dict) else None
    if (
        not isinstance(templates, list)
        or not templates
        or not all(isinstance(t, str) for t in templates)
    ):
        raise FactFileError(
            f"{where}: relation {name!r} needs a list `templates` of sentences with {{}}."
        )
    for template in templates:
        if template.count("{}") != 1:
            raise FactFileError(
                f"{where}: template {template!r} of {name!r} needs exactly one {{}}."
            )
        if template != template.strip():
            raise FactFileError(
                f"{where}: template {template!r} of {name!r} begins or ends with a space."
            )
    clauses = _strings(entry.get("clauses", ()))
    for clause in clauses:
        if clause.count("{object}") != 1:
            raise FactFileError(
                f"{where}: clause {clause!r} of {name!r} needs exactly one {{object}}."
            )
    questions = _strings(entry.get("questions", ()))
    for question in questions:
        if question.count("{}") != 1 or question != question.strip():
            raise FactFileError(
                f"{where}: question {question!r} of {name!r} needs exactly one {{}}, and no space "
                "at its ends."
            )
    return Relation(
        name,
        tuple(dict.fromkeys(templates)),
        clauses,
        _strings(entry.get("generation", ())),
        tuple(dict.fromkeys(questions)),
        entry.get("single") is True,
    )


def _start(text: str) -> str:
    """What two objects must differ in to differ in their first token, roughly."""
    return text.split()[0][:4].lower()


def _named(join: str, kind: Kind) -> str:
    return join.replace("{name}", kind.name).replace("{Name}", _capital(kind.name))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _relations(table: Mapping[str, Any], where: str) -> dict[str, Relation]:
    return {name: _relation(name, entry, where) for name, entry in table.items()}


def _from_lines(
    path: Path, text: str, relations: dict[str, Relation]
) -> tuple[tuple[Fact, ...], dict[str, Relation]]:
    facts: list[Fact] = []
    relations = dict(relations)
    lines_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FactFileError(f"{where} is not JSON: {error}") from error
        if isinstance(row, dict) and "relation" in row:
            name = str(row["relation"])
            relations[name] = _relation(name, row, where)
            continue
        if not isinstance(row, dict) or not isinstance(row.get("facts"), dict):
            raise FactFileError(
                f'{where} is no fact: expected {{"subject": ..., "kind": ..., "facts": {{...}}}}.'
            )
        subject, kind = row.get("subject"), row.get("kind", "thing")
        if not isinstance(subject, str) or not subject.strip() or not isinstance(kind, str):
            raise FactFileError(
                f"{where}: `subject` and `kind` must be text, and the subject not empty."
            )
        if subject in lines_of:
            raise FactFileError(
                f"{where}: subject {subject!r} was on line {lines_of[subject]} already."
            )
        lines_of[subject] = number
        for name, value in row["facts"].items():
            if not isinstance(value, str) or not value.strip():
                raise FactFileError(f"{where}: the {name} of {subject!r} must be text, not empty.")
            facts.append(Fact(subject.strip(), kind, name, value.strip()))
    if not facts:
        raise FactFileError(f"there is no fact in {path}.")
    used = {fact.relation for fact in facts}
    if missing := used - set(relations):
        raise FactFileError(
            f"{path}: no templates for {', '.join(sorted(missing))}.\n"
            '  Add a line {"relation": NAME, "templates": ["The ... of {} is", ...]} to the file.'
        )
    return tuple(facts), {name: relation for name, relation in relations.items() if name in used}


def _target(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("str")
    return value.strip() if isinstance(value, str) and value.strip() else None


class _Record(NamedTuple):
    """What the two CounterFact formats have in common."""

    subject: str
    relation: str
    template: str
    true: str
    new: str | None
    neighbours: tuple[tuple[str, str], ...]
    """(prompt, object) pairs that are true as well."""


def _record(row: Any, where: str) -> _Record:
    rewrite = row.get("requested_rewrite", row) if isinstance(row, dict) else {}
    subject, prompt = rewrite.get("subject"), rewrite.get("prompt")
    true = _target(rewrite.get("target_true", rewrite.get("ground_truth", rewrite.get("target"))))
    if not (isinstance(subject, str) and subject.strip() and isinstance(prompt, str) and true):
        raise FactFileError(
            f"{where} is no CounterFact case: it needs a subject, a prompt and its true object."
        )
    template = prompt if "{}" in prompt else prompt.replace(subject, "{}", 1)
    if template.count("{}") != 1:
        raise FactFileError(
            f"{where}: the subject {subject!r} does not stand once in the prompt {prompt!r}."
        )
    pairs = [(p, true) for p in row.get("neighborhood_prompts", ()) if isinstance(p, str)]
    if isinstance(row.get("locality_prompt"), str) and (
        local := _target(row.get("locality_ground_truth"))
    ):
        pairs.append((row["locality_prompt"], local))
    new = _target(rewrite.get("target_new"))
    if new:
        pairs += [(p, new) for p in row.get("attribute_prompts", ()) if isinstance(p, str)]
    template = template.strip()
    return _Record(
        subject.strip(),
        str(rewrite.get("relation_id") or template),
        template,
        true,
        new,
        tuple(pairs),
    )


def _from_counterfact(
    path: Path, text: str
) -> tuple[tuple[Fact, ...], dict[str, Relation], tuple[str, ...], dict[tuple[str, str], str]]:
    """Facts, relations, extra statements and pinned templates."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise FactFileError(f"{path} is not JSON: {error}") from error
    records = [_record(row, f"{path}, record {number}") for number, row in enumerate(rows, 1)]
    templates: dict[str, dict[str, None]] = defaultdict(dict)
    facts: dict[tuple[str, str], Fact] = {}
    pinned: dict[tuple[str, str], str] = {}
    for record in records:
        templates[record.relation][record.template] = None
        key = (record.subject, record.relation)
        if key not in facts:
            facts[key] = Fact(record.subject, record.relation, record.relation, record.true)
            pinned[key] = record.template
    extra: dict[str, None] = {}
    for record in records:
        ways = [template.split("{}") for template in templates[record.relation]]
        for prompt, value in record.neighbours:
            # A neighbour said in one of the relation's templates is a fact of its own.
            name = next(
                (
                    prompt[len(before) : len(prompt) - len(after)]
                    for before, after in ways
                    if prompt.startswith(before)
                    and prompt.endswith(after)
                    and len(prompt) > len(before + after)
                ),
                None,
            )
            if name is not None and name.strip() == name:
                facts.setdefault(
                    (name, record.relation), Fact(name, record.relation, record.relation, value)
                )
            else:
                extra[f"{prompt} {value}."] = None
    relations = {name: Relation(name, tuple(found)) for name, found in templates.items()}
    return tuple(facts.values()), relations, tuple(extra), pinned
