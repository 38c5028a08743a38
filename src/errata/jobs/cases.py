"""Facts from anywhere, as Cases: our own, published data, JSON lines, one by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from errata.errors import DatasetError, RequestFileError
from errata.measure import datasets
from errata.measure.datasets import counterfact, wikitext
from errata.measure.datasets.hub import PREFIX as HUB
from errata.measure.metrics import reads
from errata.pocket.claims import Claims
from errata.pocket.corpus import passages
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.pocket.facts import Fact
from errata.pocket.questions import question_cases
from errata.pocket.sentences import sentence_cases
from errata.pocket.statements import statement_records
from errata.requests import Case, Probe, Request, read_case_lines, read_jsonl

POCKET = "pocket"
"""The name that stands for the benchmark made from our own facts."""

POCKET_ANY = "pocket-any-wording"
"""The same with rewrites and paraphrases in any wording, lead-ins and questions included."""

REDRAWN = "pocket-redrawn"
"""The benchmark eight times over, with other new objects and wordings each time: for editors that
learn from cases, of which a single draw has too few. (The 900 of one draw are soon known by heart.)
"""

DRAWS = 8
"""How many draws that is."""

CLAIMS = "pocket-claims"
"""Claims about our own facts whose label is to be flipped, for classifiers like `pocket-bert`."""

QUESTIONS = "pocket-questions"
"""Questions about our own facts with new answers, for models that answer questions; those that are
fitted learn from `QUESTIONS_TAUGHT`, which is about other facts."""

QUESTIONS_TAUGHT = "pocket-questions-taught"
"""The same about the facts that the decoders which answer questions were tuned on."""

QUESTIONS_REDRAWN = "pocket-questions-redrawn"
"""`QUESTIONS_TAUGHT` with several new answers to each fact, as `REDRAWN` has several objects."""

PASSAGES = "pocket-passages"
"""Passages about our own subjects to go on with, in WikiText's form; those that are fitted learn
from `PASSAGES_TAUGHT`, which is about other subjects."""

PASSAGES_TAUGHT = "pocket-passages-taught"
"""The same about the other half of the subjects."""

SENTENCES = "pocket-sentences"
"""Passages about our own subjects with a made-up sentence to follow, and others that are to keep
their true ones (SCEN's second task); numbers are chosen on `SENTENCES_TAUGHT`."""

SENTENCES_TAUGHT = "pocket-sentences-taught"
"""The same about other subjects."""

SENTENCES_REDRAWN = "pocket-sentences-redrawn"
"""Several of these for each of the other subjects, which the true sentences are about too: for
editors that learn from cases."""

POCKET_SOURCES: Mapping[str, Callable[[int, int | None], list[Case]]] = {
    POCKET: lambda seed, count: pocket_cases(count, seed=seed),
    POCKET_ANY: lambda seed, count: pocket_cases(count, seed=seed, any_wording=True),
    REDRAWN: lambda seed, count: redrawn(lambda one: pocket_cases(seed=one), seed, count),
    CLAIMS: lambda seed, count: Claims(Encyclopedia.load()).cases(seed, count),
    QUESTIONS: lambda seed, count: question_cases(Encyclopedia.load(), seed, count),
    QUESTIONS_TAUGHT: lambda seed, count: taught_questions(seed, count),
    QUESTIONS_REDRAWN: lambda seed, count: redrawn(taught_questions, seed, count),
    PASSAGES: lambda seed, count: passage_cases(count, seed=seed),
    PASSAGES_TAUGHT: lambda seed, count: passage_cases(count, seed=seed, taught=True),
    SENTENCES: lambda seed, count: sentence_cases(Encyclopedia.load(), seed, count),
    SENTENCES_TAUGHT: lambda seed, count: sentence_cases(
        Encyclopedia.load(), seed, count, part="taught"
    ),
    SENTENCES_REDRAWN: lambda seed, count: redrawn(
        lambda one: sentence_cases(Encyclopedia.load(), one, part="taught", beside="taught"),
        seed,
        count,
    ),
}
"""What these names stand for: the first `count` cases that a seed draws, or all."""

DEMO = (
    ("Claude Monet", "birthplace", "Vienna"),
    ("BMW", "country", "Japan"),
    ("Nile", "mouth", "Black Sea"),
    ("Wolfgang Amadeus Mozart", "occupation", "physicist"),
    ("France", "official_language", "Arabic"),
    ("Ferrari", "industry", "video games"),
    ("Egypt", "continent", "Europe"),
    ("Isaac Newton", "century", "20th century"),
)
"""Facts that many readers know, so that they see at once what the demo changes: subject, relation,
new object."""


def read_cases(source: Path | str, count: int | None = None) -> list[Case]:
    """The first `count` cases of a source.

    Args:
        source: a name in `POCKET_SOURCES`; a file in a published format that `measure.datasets`
            reads, or `hub:NAME` for one on the Hub; or JSON lines of requests, each with whatever
            it brings to be checked by.
        count: at most so many; all of them by default.

    Raises:
        DatasetError: the file is in no known format, or a record is malformed.
        RequestFileError: a line of a JSON-lines file is not a request.
    """
    if str(source) in POCKET_SOURCES:
        return POCKET_SOURCES[str(source)](0, count)
    if str(source).startswith(HUB):
        return datasets.read(str(source), count)
    path = Path(source)
    if not path.exists():
        raise RequestFileError(
            f"there is no file {path}. Give JSON lines of requests, a published data set such as "
            f"CounterFact's or zsRE's, or one of {', '.join(POCKET_SOURCES)}, which come with "
            "errata."
        )
    if path.suffix in (".json", ".csv"):
        return datasets.read(path, count)
    if path.suffix == ".txt" and not path.read_bytes().lstrip().startswith(b"{"):
        return datasets.read(path, count)  # text, not lines of JSON
    if datasets.is_published([record for _, record in read_jsonl(path)[:1]]):
        return datasets.read(path, count)
    return read_case_lines(path)[:count]


def sample_cases(source: Path | str, count: int | None, seed: int) -> list[Case]:
    """A sample of a source's cases, each with an id: the same for the same seed, each prompt once.

    Of the benchmark made from our own facts the seed also draws new objects and templates. Where a
    file has two cases with one prompt, which would contradict each other in a batch, the sample has
    the one that was drawn first.

    Raises:
        DatasetError: there are fewer than `count` cases, or none.
        RequestFileError: there is no such file.
    """
    if str(source) in POCKET_SOURCES:
        drawn = [
            # Numbers are of places in the sample: here a case is known by its fact.
            replace(case, case_id=f"{case.request.subject} | {case.relation}")
            for case in POCKET_SOURCES[str(source)](seed, None)
        ]
    else:
        drawn = read_cases(source)
        stable_random("sample", seed).shuffle(drawn)
    different: dict[str, Case] = {}
    for case in drawn:
        different.setdefault(case.request.text.rstrip(), case)
    if len(different) < (count or 1):
        raise DatasetError(
            f"{source} has {len(different)} cases with different prompts; {count or 1} were asked "
            "for. Lower the count."
        )
    times = Counter(case.case_id for case in different.values())
    return [
        replace(case, case_id=case.case_id if case.case_id and times[case.case_id] == 1 else text)
        for text, case in list(different.items())[:count]
    ]


def pocket_cases(
    count: int | None = None, *, seed: int = 0, any_wording: bool = False
) -> list[Case]:
    """The benchmark made from the pocket encyclopedia, spread evenly over its relations."""
    records = statement_records(Encyclopedia.load(), seed, count, any_wording=any_wording)
    return counterfact.cases(records, source=POCKET)


def redrawn(draw: Callable[[int], list[Case]], seed: int, count: int | None) -> list[Case]:
    """Several draws of a source, one after another; each prompt once, as it was drawn last.

    A smaller count has the prompts of the first draws.
    """
    draws = (draw(seed * DRAWS + number) for number in range(DRAWS))
    different = {case.request.text: case for cases in draws for case in cases}
    return list(islice(different.values(), count))


def taught_questions(seed: int = 0, count: int | None = None) -> list[Case]:
    """Questions about the facts that decoders were tuned on, with new answers."""
    return question_cases(Encyclopedia.load(), seed, count, part="taught")


def passage_cases(count: int | None = None, *, seed: int = 0, taught: bool = False) -> list[Case]:
    """Passages to go on with as they do, several about each subject of a half."""
    lines = passages(Encyclopedia.load(), seed, taught=taught, rounds=DRAWS)
    return wikitext.continuations(lines, count, source=PASSAGES_TAUGHT if taught else PASSAGES)


def demo_cases(count: int) -> list[Case]:
    """Well-known facts first, then the beginning of the benchmark, to `count`."""
    encyclopedia = Encyclopedia.load()
    chosen = []
    for subject, relation, target in DEMO[:count]:
        for fact in encyclopedia.about.get(subject, ()):
            if fact.relation == relation:
                seen = encyclopedia.split(fact).seen
                # The plainest way to say it, which the relation's list begins with.
                prompt = next(t for t in encyclopedia.relations[relation].templates if t in seen)
                request = Request(prompt, subject, target, fact.object)
                chosen.append(_checked(Case(request), encyclopedia, {}))
    subjects = {case.request.subject for case in chosen}
    others = (case for case in pocket_cases() if case.request.subject not in subjects)
    return [*chosen, *islice(others, count - len(chosen))]


def with_pocket_checks(cases: Sequence[Case], said: Mapping[str, str] | None = None) -> list[Case]:
    """Give requests about the pocket encyclopedia's facts the prompts that judge them.

    A request about a fact of the encyclopedia gets that fact's held-out templates as paraphrases,
    subjects with the same true object as neighbours, and the subject's other facts. Any other
    case, and one that has such prompts already, stays as it is.

    Args:
        cases: requests, in any words. Which of a subject's facts one is about is told by its
            prompt if that is a template of the relation, else by the answer of today.
        said: what the model says today after prompts, where the requests do not say it.
    """
    encyclopedia = Encyclopedia.load()
    return [
        case if case.paraphrases or case.neighbours else _checked(case, encyclopedia, said or {})
        for case in cases
    ]


def _checked(case: Case, encyclopedia: Encyclopedia, said: Mapping[str, str]) -> Case:
    request = case.request
    facts = encyclopedia.about.get(request.subject, ())
    today = request.true or said.get(request.text, "")
    worded = [f for f in facts if request.prompt in encyclopedia.relations[f.relation].templates]
    meant = worded or [f for f in facts if reads(today, f.object)]
    if not meant:
        return case
    fact = meant[0]
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
