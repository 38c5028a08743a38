"""Facts, how relations are said, and reading both from files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from errata.errors import FactFileError


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
        return f"{_capitalised(self.subject.replace('{}', subject))} {self.intro}."

    def named(self, sentence: str) -> str:
        """A sentence with the noun in place of `{name}` or `{Name}`."""
        return sentence.replace("{name}", self.name).replace("{Name}", _capitalised(self.name))


def relations_of(table: Mapping[str, Any], where: str) -> dict[str, Relation]:
    """Relations from a table of their names.

    Raises:
        FactFileError: one of them cannot be used; `where` it stands is told.
    """
    return {name: _relation(name, entry, where) for name, entry in table.items()}


def facts_of_lines(
    path: Path, text: str, relations: Mapping[str, Relation]
) -> tuple[tuple[Fact, ...], dict[str, Relation]]:
    """Facts, and the relations that they use: known ones and those that the file defines.

    Raises:
        FactFileError: a line is no fact, or a relation is neither known nor defined.
    """
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


def facts_of_counterfact(
    path: Path, text: str
) -> tuple[tuple[Fact, ...], dict[str, Relation], tuple[str, ...], dict[tuple[str, str], str]]:
    """Facts, relations, extra statements and pinned templates.

    Raises:
        FactFileError: the text is not JSON, or a record is no case.
    """
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


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
