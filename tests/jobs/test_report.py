"""The report: one page, everything escaped, readable without colours."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from errata.errors import StorageError
from errata.jobs.ask import facts_of
from errata.jobs.record import Change, Fact, RunRecord, Said, ScoreLine
from errata.jobs.report import counts, render, save_report, size_text
from errata.measure.metrics import Estimate
from errata.requests import Case, Probe, Request

EVIL = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"


def record(text: str = "Paris") -> RunRecord:
    said = (
        Said("prompt", f"The capital of {text} is", text, before=text, after=f"{text}, of course"),
        Said("paraphrase", f"{text} has its capital in", text, before="no", after="still no"),
        Said("neighbour", "The capital of Italy is", "Rome", before="Rome.", after="Rome."),
        Said("neighbour", "The capital of Spain is", "Madrid", before="Madrid", after="Paris"),
        Said("same subject", f"{text} uses the", "euro", before="franc", after="franc"),
    )
    return RunRecord(
        title=f"1 fact corrected in {text}",
        model=text,
        method="memit",
        config={"note": text},
        facts=(Fact(text, "The capital of {} is", text, text, said),),
        fact_count=1,
        scores=(
            ScoreLine("Efficacy", text, (Estimate(0.0, 0.0, 0.2, 9), Estimate(0.9, 0.7, 1.0, 9))),
            ScoreLine("Drift", "nats", (None, Estimate(0.01, math.nan, math.nan, 1)), False),
        ),
        changes=(Change(text, 1.5, 1, 30.0), Change("other", 0.5, 1)),
        edit_file=f"{text}.safetensors",
        edit_bytes=12_345,
        notes=(text,),
    )


class Tags(HTMLParser):
    """Collects the tags and what they load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_everything_from_outside_is_escaped() -> None:
    page = render(record(EVIL))
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page  # a model's braces are text, not a template


def test_the_page_loads_nothing() -> None:
    page = render(record())
    tags = Tags()
    tags.feed(page)
    assert tags.loads == []
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", page)


def test_verdicts_are_words() -> None:
    page = render(record())
    for word in ("corrected", "not corrected", "kept", "moved", "wrong before"):
        assert word in page


def test_scores_have_intervals_and_pictures() -> None:
    page = render(record())
    assert "90.0" in page and "[70.0, 100.0]" in page
    assert page.count('role="img"') == 1 + 2  # one score that is a share, two weights


def test_a_neighbour_that_was_wrong_cannot_be_kept() -> None:
    assert counts(record().facts) == {
        "prompt": (1, 1),
        "paraphrase": (0, 1),
        "neighbour": (1, 2),
    }


def test_json_beside_the_page_holds_the_record(tmp_path: Path) -> None:
    page, data = save_report(record(), tmp_path / "deep" / "run.html")
    found = json.loads(data.read_text(encoding="utf-8"))
    assert page.exists()
    assert found["facts"][0]["said"][0]["after"] == "Paris, of course"
    assert found["scores"][1]["estimates"] == [None, [0.01, None, None, 1]]


def test_a_record_without_facts_or_scores_is_a_page() -> None:
    assert "<h1>empty</h1>" in render(RunRecord(title="empty", model="m"))


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        save_report(record(), blocked / "run.html")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_345, "12.3 kB"), (4e6, "4.0 MB"), (5e9, "5.0 GB")],
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert size_text(count) == text


def test_what_should_not_come_any_more_is_right_where_it_does_not() -> None:
    said = Said("prompt", "The capital of France is", "Paris", "Paris.", "Lyon.", unwanted=True)
    assert said.right and not said.right_before and said.verdict == "corrected"
    assert not replace(said, after="Paris, still").right
    gone = Request("The capital of {} is", "France", "Paris", "Paris", "fact-erasure")
    other = Probe("The capital of Italy is", "Rome")
    (fact,) = facts_of([Case(gone, paraphrases=("France's capital:",), neighbours=(other,))])
    assert fact.target == "not Paris" and [one.unwanted for one in fact.said] == [True, True, False]
    assert gone.posed("fact-forcing").wish == "Paris, behind noise"
