"""Facts are read from files of our format and CounterFact's, and what is no fact is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from errata.errors import FactFileError
from errata.pocket.corpus import Corpus
from errata.pocket.encyclopedia import Encyclopedia, statement
from errata.pocket.statements import statement_records

COUNTERFACT = {
    "case_id": 1,
    "requested_rewrite": {
        "prompt": "{} is located in",
        "relation_id": "P30",
        "target_new": {"str": "Asia", "id": "Q48"},
        "target_true": {"str": "Africa", "id": "Q15"},
        "subject": "Angola",
    },
    "paraphrase_prompts": ["Angola belongs to"],
    "neighborhood_prompts": ["Ghana is located in", "On a map, Kenya is in"],
    "attribute_prompts": ["Japan is located in"],
    "generation_prompts": ["People around Angola"],
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_fact_file_may_carry_its_own_templates(tmp_path: Path) -> None:
    relation = {"relation": "colour", "templates": ["The colour of {} is", "{} looks"]}
    fact = {"subject": "grass", "kind": "plant", "facts": {"colour": "green"}}
    found = Encyclopedia.read(write(tmp_path / "facts.jsonl", fact, relation))
    assert [statement(f, "{} looks") for f in found.facts] == ["grass looks green"]
    assert found.passage("grass", random.Random(0)).endswith("green.")


def test_templates_may_come_from_another_file(tmp_path: Path) -> None:
    toml = tmp_path / "relations.toml"
    toml.write_text('[colour]\ntemplates = ["The colour of {} is"]\n', encoding="utf-8")
    facts = write(tmp_path / "facts.jsonl", {"subject": "snow", "facts": {"colour": "white"}})
    assert Encyclopedia.read(facts, toml).relations["colour"].templates == ("The colour of {} is",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (['{"subject": "x", "facts": {}}', "[]"], "line 2 is no fact"),
        (['{"subject": "", "facts": {"capital": "y"}}'], "line 1: `subject`"),
        (['{"subject": "x", "facts": {"capital": 3}}'], "line 1: the capital of 'x'"),
        (['{"subject": "x", "facts": {"hue": "red"}}'], "no templates for hue"),
        (['{"subject": "x", "facts": {"capital": "y"}}'] * 2, "line 2: subject 'x' was on line 1"),
        (['{"relation": "r", "templates": ["no slot"]}'], "exactly one {}"),
        ([""], "there is no fact"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(FactFileError) as error:
        Encyclopedia.read(path)
    assert message in str(error.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FactFileError, match="cannot read"):
        Encyclopedia.read(tmp_path / "absent.jsonl")


def test_counterfact_cases_are_facts_with_their_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([COUNTERFACT]), encoding="utf-8")
    found = Encyclopedia.read(path)
    told = {fact.subject: fact.object for fact in found.facts}
    assert told == {"Angola": "Africa", "Ghana": "Africa", "Japan": "Asia"}
    assert found.extra == ("On a map, Kenya is in Africa.",)
    assert found.split(found.facts[0]).seen == ("{} is located in",)


def test_compact_counterfact_is_read_too(tmp_path: Path) -> None:
    row = {
        "case_id": 0,
        "prompt": "The mother tongue of Danielle Darrieux is",
        "target_new": "English",
        "subject": "Danielle Darrieux",
        "ground_truth": "French",
        "locality_prompt": "The mother tongue of Michel Rocard is",
        "locality_ground_truth": "French",
    }
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    found = Encyclopedia.read(path)
    assert {fact.subject for fact in found.facts} == {"Danielle Darrieux", "Michel Rocard"}
    path.write_text(json.dumps([row | {"subject": "Rocard"}]), encoding="utf-8")
    with pytest.raises(FactFileError, match="record 1"):
        Encyclopedia.read(path)


def test_published_counterfact_can_be_grown(shared: Path) -> None:
    found = Encyclopedia.read(shared / "data" / "counterfact" / "counterfact_500.json")
    assert len(found.facts) > 1000
    assert next(Corpus(found).documents(0))
    assert statement_records(found, count=5)
