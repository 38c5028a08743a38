"""Facts from anywhere, as Cases: our own, published data, JSON lines, one by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from errata.errors import RequestFileError
from errata.measure import datasets
from errata.measure.datasets import counterfact
from errata.pocket.encyclopedia import Encyclopedia, Fact
from errata.requests import Case, Probe, Request, read_requests

POCKET = "pocket"
"""The name that stands for the benchmark made from our own facts."""

DEMO = (
    ("France", "capital"),
    ("Albert Einstein", "birthplace"),
    ("Danube", "mouth"),
    ("Gold", "symbol"),
    ("Japan", "currency"),
    ("Johann Sebastian Bach", "occupation"),
    ("Toyota", "country"),
    ("Claude Monet", "movement"),
)
"""Facts that many readers know, so that they see at once what the demo changes."""


def read_cases(source: Path | str, count: int | None = None) -> list[Case]:
    """The first `count` cases of a source.

    Args:
        source: `pocket`; a JSON file in CounterFact's or zsRE's published format; or JSON lines
            of requests, which become cases without further prompts.
        count: at most so many; all of them by default.

    Raises:
        DatasetError: the file is in no known format, or a record is malformed.
        RequestFileError: a line of a JSON-lines file is not a request.
    """
    if str(source) == POCKET:
        return pocket_cases(count)
    path = Path(source)
    if not path.exists():
        raise RequestFileError(
            f"there is no file {path}. Give JSON lines of requests, a CounterFact or zsRE file, or "
            f"{POCKET!r} for the benchmark that comes with errata."
        )
    if path.suffix == ".json":
        return datasets.read(path, count)
    return [Case(request) for request in read_requests(path)[:count]]


def pocket_cases(count: int | None = None, *, seed: int = 0) -> list[Case]:
    """The benchmark made from the pocket encyclopedia, spread evenly over its relations."""
    return counterfact.cases(Encyclopedia.load().cases(seed=seed, count=count), source=POCKET)


def demo_cases(count: int) -> list[Case]:
    """Well-known facts first, then the beginning of the benchmark, to `count`."""
    cases = pocket_cases()
    known = {(case.request.subject, case.relation): case for case in cases}
    chosen = [known[key] for key in DEMO if key in known]
    subjects = {case.request.subject for case in chosen}
    chosen += [case for case in cases if case.request.subject not in subjects]
    return chosen[:count]


def with_pocket_checks(cases: Sequence[Case]) -> list[Case]:
    """Give requests about the pocket encyclopedia's facts the prompts that judge them.

    A request whose subject and prompt are a fact's of the encyclopedia gets that fact's held-out
    templates as paraphrases, subjects with the same true object as neighbours, and the subject's
    other facts. Any other case, and one that has such prompts already, stays as it is.
    """
    encyclopedia = Encyclopedia.load()
    return [
        case if case.paraphrases or case.neighbours else _checked(case, encyclopedia)
        for case in cases
    ]


def _checked(case: Case, encyclopedia: Encyclopedia) -> Case:
    request = case.request
    facts = encyclopedia.about.get(request.subject, ())
    fact = next(
        (f for f in facts if request.prompt in encyclopedia.relations[f.relation].templates), None
    )
    if fact is None:
        return case
    held_out = [t for t in encyclopedia.split(fact).held_out if t != request.prompt]
    sharing = encyclopedia.sharing[fact.relation, fact.object]
    return replace(
        case,
        request=replace(request, true=request.true or fact.object),
        relation=fact.relation,
        paraphrases=tuple(encyclopedia.prompt(fact, template) for template in held_out),
        neighbours=tuple(_probe(encyclopedia, f) for f in sharing if f.subject != fact.subject)[
            :10
        ],
        same_subject=tuple(_probe(encyclopedia, f) for f in facts if f.relation != fact.relation),
    )


def _probe(encyclopedia: Encyclopedia, fact: Fact) -> Probe:
    return Probe(encyclopedia.prompt(fact, encyclopedia.split(fact).seen[0]), fact.object)


def one_case(subject: str, prompt: str, target: str, true: str | None = None) -> Case:
    """A case from the parts of one request.

    Raises:
        RequestError: the prompt does not name the subject exactly once, or a part is empty.
    """
    return Case(Request.parse(prompt, subject, target, true))
