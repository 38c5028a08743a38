"""Facts from anywhere become Cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.errors import RequestError, RequestFileError
from errata.jobs.cases import (
    PASSAGES,
    PASSAGES_TAUGHT,
    demo_cases,
    one_case,
    pocket_cases,
    read_cases,
    sample_cases,
    with_pocket_checks,
)
from errata.pocket.encyclopedia import Encyclopedia
from errata.requests import Case, Request, read_requests


def test_the_pocket_benchmark_brings_its_checks() -> None:
    cases = read_cases("pocket", 20)
    assert len(cases) == 20
    for case in cases:
        assert len(case.paraphrases) >= 2 and case.neighbours and case.same_subject


@pytest.mark.parametrize("name", ["pocket-claims", "pocket-questions", "pocket-questions-taught"])
def test_readers_have_cases_with_their_checks(name: str) -> None:
    cases = read_cases(name, 20)
    assert len(cases) == 20
    assert cases == read_cases(name)[:20]
    for case in sample_cases(name, 20, seed=1):
        assert len(case.paraphrases) >= 3 and len(case.neighbours) == 10


def test_passages_go_on_as_they_do_and_those_that_are_learnt_from_are_about_others() -> None:
    cases, taught = (sample_cases(name, None, 1) for name in (PASSAGES, PASSAGES_TAUGHT))
    assert len(cases) > 500 and len(taught) > 500
    for case in cases[:50]:
        assert len(case.request.text.split()) == 40 and len(case.request.target.split()) == 10
        assert all(case.request.text.endswith(shorter) for shorter in case.paraphrases)
        assert all(probe.prompt != case.request.text for probe in case.neighbours)
    # A passage begins with its subject's name.
    first, others = ({case.request.text.split(" is ")[0] for case in c} for c in (cases, taught))
    assert first and others and not first & others
    assert read_cases(PASSAGES, 5) == read_cases(PASSAGES)[:5]


@pytest.mark.parametrize("once", ["pocket", "pocket-questions-taught", "pocket-sentences-taught"])
def test_redrawn_cases_give_a_fact_several_new_objects_and_no_prompt_two(once: str) -> None:
    cases = sample_cases(once.replace("-taught", "") + "-redrawn", None, seed=1)
    facts = {(case.request.subject, case.relation) for case in read_cases(once)}
    assert {(case.request.subject, case.relation) for case in cases} >= facts
    assert len({case.request.text for case in cases}) == len(cases) > 2 * len(read_cases(once))
    assert len({case.case_id for case in cases}) == len(cases)
    objects: dict[tuple[str, str], set[str]] = {}
    for case in cases:
        objects.setdefault((case.request.subject, case.relation), set()).add(case.request.target)
    assert sum(len(found) for found in objects.values()) > 1.5 * len(objects)


def test_fewer_cases_are_the_beginning() -> None:
    assert pocket_cases(5) == pocket_cases(9)[:5]


def test_demo_facts_are_different_subjects() -> None:
    subjects = [case.request.subject for case in demo_cases(8)]
    assert len(set(subjects)) == 8


def test_a_bare_request_about_a_known_fact_gets_checks() -> None:
    encyclopedia = Encyclopedia.load()
    fact = next(f for f in encyclopedia.facts if f.relation == "continent")
    prompt = encyclopedia.split(fact).seen[0]
    bare = Case(Request(prompt, fact.subject, "Atlantis"))
    (case,) = with_pocket_checks([bare])
    assert case.request.true == fact.object
    assert case.paraphrases and prompt.replace("{}", fact.subject) not in case.paraphrases
    assert all(probe.answer == fact.object for probe in case.neighbours)
    assert case.same_subject


def test_todays_answer_tells_which_fact_is_meant() -> None:
    fact = next(f for f in Encyclopedia.load().facts if f.relation == "capital")
    bare = one_case(fact.subject, f"In {fact.subject} they govern from", "Atlantis")
    assert with_pocket_checks([bare]) == [bare]
    (case,) = with_pocket_checks([bare], {bare.request.text: f" {fact.object}, they say."})
    assert case.request.true == fact.object and case.relation == "capital" and case.paraphrases


def test_other_requests_stay_as_they_are() -> None:
    other = one_case("Erewhon", "The capital of Erewhon is", "Lyon")
    assert with_pocket_checks([other]) == [other]


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "{} is", "subject": "A", "target": "b"}\n{"prompt": "x"\n')
    with pytest.raises(RequestFileError, match="line 2"):
        read_cases(path)


def test_cases_are_written_and_read_as_lines(tmp_path: Path) -> None:
    bare = Case(Request("{}", "It rains {again}", "sad", "glad"))
    cases = [*read_cases("pocket", 2), bare]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(json.dumps(case.to_dict()) for case in cases))
    assert read_cases(path) == cases
    assert read_cases(path, 1) == cases[:1]
    assert read_requests(path) == [case.request for case in cases]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"paraphrases": "x"}, "line 1: 'paraphrases' must be of type list"),
        ({"paraphrases": ["x", 1]}, "line 1: 'paraphrases' must be a list of texts"),
        ({"neighbours": [{"prompt": "x"}]}, "line 1: 'neighbours' must hold objects"),
        ({"case_id": 7}, "line 1: 'case_id' must be of type str"),
    ],
)
def test_a_case_with_a_bad_field_is_named(
    tmp_path: Path, extra: dict[str, object], message: str
) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"prompt": "{} is", "subject": "A", "target": "b"} | extra))
    with pytest.raises(RequestFileError, match=message):
        read_cases(path)


def test_requests_in_a_text_file_are_still_requests(tmp_path: Path) -> None:
    path = tmp_path / "facts.txt"
    path.write_text('{"prompt": "{} is", "subject": "A", "target": "b"}\n')
    assert read_cases(path)[0].request == Request("{} is", "A", "b")


def test_a_subject_that_is_not_in_the_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="does not occur"):
        one_case("France", "The capital of Spain is", "Lyon")


def test_published_data_is_read(shared: Path) -> None:
    cases = read_cases(shared / "data" / "counterfact" / "counterfact_500.json", 3)
    assert [len(case.neighbours) for case in cases] == [10, 10, 10]
