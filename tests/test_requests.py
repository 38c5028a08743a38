from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errata.edits.edit import as_json
from errata.errors import RequestError, RequestFileError
from errata.jobs.studies.keys import cases_hash
from errata.requests import (
    INJECTION,
    VARIANTS,
    Case,
    Probe,
    Request,
    check_batch,
    read_jsonl,
    read_requests,
    unique,
)

GOOD = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris"}


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


def test_text_and_span() -> None:
    request = Request("In {} {{x}}, {y} is", "{a} {b}", "x")
    assert request.text == "In {a} {b} {{x}}, {y} is"
    start, end = request.span
    assert request.text[start:end] == request.subject


def test_the_slot_counts_where_the_subject_occurs_twice() -> None:
    request = Request("Paris, Paris: {} is", "Paris", "x")
    assert request.span == (14, 19)


@pytest.mark.parametrize("prompt", ["The capital", "{} and {}", "", " ", "{ }"])
def test_prompts_need_one_slot(prompt: str) -> None:
    with pytest.raises(RequestError, match="prompt"):
        Request(prompt, "France", "Lyon")


@pytest.mark.parametrize("field", ["subject", "target", "true"])
@pytest.mark.parametrize("value", ["", "  \n", 7, ["x"]])
def test_fields_need_text(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        Request(**GOOD | {field: value})


def test_half_characters_are_refused() -> None:
    with pytest.raises(RequestError, match="'subject' holds half a character"):
        Request("{} is", "\ud83d", "x")


def test_parse_finds_the_subject() -> None:
    assert Request.parse("The capital of France is", "France", "Lyon").prompt == GOOD["prompt"]
    assert Request.parse("The capital of {} is", "France", "Lyon").prompt == GOOD["prompt"]
    assert Request.parse("What is {}?", "{}", "x").text == "What is {}?"
    with pytest.raises(RequestError, match="does not occur"):
        Request.parse("The capital of Italy is", "France", "Lyon")
    with pytest.raises(RequestError, match="occurs 2 times"):
        Request.parse("France is France", "France", "Lyon")
    with pytest.raises(RequestError, match="subject"):
        Request.parse("The capital of Italy is", "", "Lyon")


def test_records_go_there_and_back() -> None:
    request = Request.from_dict(GOOD)
    assert request.to_dict() == GOOD
    assert Request.from_dict({k: v for k, v in GOOD.items() if k != "true"}).true is None


def test_published_records_are_understood() -> None:
    counterfact = {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "subject": "France",
        "target_new": {"str": "Lyon", "id": "Q1"},
        "target_true": {"str": "Paris", "id": "Q2"},
    }
    easyedit = {
        "prompt": "The capital of France is",
        "subject": "France",
        "target_new": "Lyon",
        "ground_truth": "Paris",
    }
    assert Request.from_dict(counterfact) == Request.from_dict(easyedit) == Request(**GOOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "'target' must be text"),
        ({"subject": 5}, "'subject' must be text"),
        ({"true": 5}, "'true' must be a non-empty text"),
        ({"target_new": "Nice"}, "gives 'target' twice"),
        ({"prompt": "The capital"}, "does not occur"),
    ],
)
def test_wrong_records_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request.from_dict(GOOD | change)


def test_missing_keys_are_named() -> None:
    with pytest.raises(RequestError, match="lacks 'subject', 'target'"):
        Request.from_dict({"prompt": "x {}", "targt": "y"})


def test_files_may_have_blank_lines_bom_windows_ends_and_any_text(tmp_path: Path) -> None:
    # U+2028, U+0085 and form feeds end lines for str.splitlines, not for JSON.
    odd = GOOD | {"subject": "日本国 👩🏽‍🚀 \u2028 \u0085 {x} é"}
    lines = [
        json.dumps(GOOD),
        "",
        json.dumps(odd, ensure_ascii=False) + "\r",
        "  ",
        json.dumps(odd),
    ]
    path = write(tmp_path / "r.jsonl", b"\xef\xbb\xbf" + lines[0].encode(), *lines[1:])
    assert read_requests(path) == [Request(**GOOD), Request(**odd), Request(**odd)]
    assert [number for number, _ in read_jsonl(str(path))] == [1, 3, 5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(GOOD)[:-9], r"line 2, column \d+: not valid JSON"),
        ("{'prompt': 1}", "line 2, column 2: not valid JSON"),
        (json.dumps(GOOD) + ",", "line 2, column"),
        ("[1, 2]", "line 2: expected a JSON object, got list"),
        ("null", "line 2: expected a JSON object"),
        (b'{"prompt": "\xff"}', "line 2: not UTF-8"),
        ('{"prompt": "x"}', "line 2: the record lacks 'subject'"),
        (json.dumps(GOOD | {"prompt": "{} {}"}), "line 2: .* has 2 slots"),
        ('{"prompt": "{} is", "subject": "\\ud83d", "target": "x"}', "line 2: .*half a character"),
        ("[" * 100_000, "line 2: nested too deeply"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = write(tmp_path / "r.jsonl", json.dumps(GOOD), line, json.dumps(GOOD))
    with pytest.raises(RequestFileError, match=message):
        read_requests(path)


def test_files_that_hold_nothing_or_are_none(tmp_path: Path) -> None:
    with pytest.raises(RequestFileError, match="holds no request"):
        read_requests(write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(RequestFileError, match="cannot read .*absent"):
        read_requests(tmp_path / "absent.jsonl")
    with pytest.raises(RequestFileError, match="cannot read"):
        read_requests(tmp_path)


def test_contradictions_are_refused_by_name() -> None:
    one = Request(**GOOD)
    same_elsewhere = Request("The {} of France is", "capital", " Lyon ")
    other = Request("The capital of {} is ", "France", "Nice")
    check_batch([one, one, same_elsewhere])
    with pytest.raises(RequestError, match="'The capital of France is .*'Lyon', another 'Nice'"):
        check_batch([one, other])
    with pytest.raises(RequestError, match="no request"):
        check_batch([])


def test_unique_keeps_the_order() -> None:
    one, two = Request(**GOOD), Request("{} is", "Rome", "old")
    assert unique([two, one, Request(**GOOD | {"target": " Lyon"}), two])[0] == two
    assert len(unique([two, one, Request(**GOOD | {"target": " Lyon"}), two])) == 2


FACT = Request("The capital of {} is", "France", "Lyon", "Paris")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_go_there_and_back(variant: str, tmp_path: Path) -> None:
    posed = FACT.posed(variant)
    assert posed.target == ("Paris" if VARIANTS[variant].target == "true" else "Lyon")
    assert Request.from_dict(posed.to_dict()) == posed
    assert ("variant" in posed.to_dict()) == (variant != INJECTION)
    path = write(tmp_path / "facts.jsonl", json.dumps(posed.to_dict()))
    assert read_requests(path) == [posed]


def test_what_is_true_needs_no_target() -> None:
    record = {key: GOOD[key] for key in ("prompt", "subject", "true")}
    posed = Request.from_dict(record | {"variant": "fact-erasure"})
    assert posed == FACT.posed("fact-erasure") and posed.problem.minimised
    with pytest.raises(RequestError, match="lacks 'target'"):
        Request.from_dict(record | {"variant": "tracing-reversal"})


def test_a_variant_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RequestError, match="no variant 'fact-erazure'; there are error-injection"):
        Request.from_dict(GOOD | {"variant": "fact-erazure"})
    with pytest.raises(RequestError, match="fact-erasure is about what is true.*'Paris', not 'Ly"):
        Request.from_dict(GOOD | {"variant": "fact-erasure"})
    with pytest.raises(RequestError, match="fact-forcing.*give it as 'true'"):
        Request("The capital of {} is", "France", "Lyon").posed("fact-forcing")


def test_records_and_hashes_of_the_default_do_not_know_variants() -> None:
    """What was written before there were variants is written so still."""
    case = Case(FACT, "1", neighbours=(Probe("The capital of Italy is", "Rome"),))
    assert as_json(case)["request"] == GOOD == FACT.to_dict()
    assert as_json(FACT.posed("fact-erasure"))["variant"] == "fact-erasure"
    assert as_json(Request("{} is", "A", "b")) == {
        "prompt": "{} is",
        "subject": "A",
        "target": "b",
        "true": None,
    }
    assert cases_hash([case])[:16] == "325fd382ab2f1ace"


def test_variants_of_one_fact_contradict_each_other() -> None:
    gone, more = FACT.posed("fact-erasure"), FACT.posed("fact-amplification")
    with pytest.raises(RequestError, match="wants fact-erasure of 'Paris', another fact-ampl"):
        check_batch([gone, more], VARIANTS)
    assert unique([gone, more, gone]) == [gone, more]
    with pytest.raises(RequestError, match="does error-injection alone, not fact-erasure"):
        check_batch([gone])
