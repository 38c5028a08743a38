"""Rephrasers: seeded, never the text itself, and as many as they can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.errors import DatasetError, ModelLoadError
from errata.jobs.rephrasing import RULES, by_rules, rephraser
from errata.progress import silent
from tests.lm.families import tiny_lm

TEXTS = [
    "When I came home, the dog was very happy. I am glad!",
    "Fox 2000 Pictures released the film Soul Food.",
    "ok",
    "{curly} and 100% odd \\1 (text",
]


def test_rules_give_different_wordings_by_the_seed() -> None:
    for text in TEXTS:
        found = by_rules(text, 10)
        assert len(found) == 10 == len({new.lower() for new in found} - {text.lower()})
        assert found == by_rules(text, 10)
        assert found[:3] == by_rules(text, 3)
        assert found != by_rules(text, 10, seed=1)


def test_rules_keep_what_the_text_is_about() -> None:
    for new in by_rules("Marie Curie was born in Warsaw.", 10):
        assert "Marie Curie" in new and "Warsaw" in new


def test_a_file_gives_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "rephrasings.jsonl"
    rows = [{"text": "ok", "rephrasings": ["fine", "good"]}, {"text": "ok", "rephrasings": ["so"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    read = rephraser(path)
    assert read(["ok", "else"], 3, silent) == [["fine", "good", "so"], []]
    assert read(["ok"], 1, silent) == [["fine"]]
    with pytest.raises(DatasetError, match="rephrases none of the 1 texts"):
        read(["else"], 3, silent)
    path.write_text('{"text": "ok"}\n{"text": 5}')
    with pytest.raises(DatasetError, match="line 2: 'text' must be text"):
        rephraser(path)


def test_any_seq2seq_model_rephrases(tmp_path: Path) -> None:
    lm = tiny_lm("t5")
    lm.network.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    write = rephraser(tmp_path, prefix="paraphrase: ", seed=3)
    found = write(["Rivers flow to the sea."] * 2, 2, silent)
    assert found[0] == found[1], "each text draws from the seed and itself alone"
    assert all(new.strip() for new in found[0])
    assert write(["Rivers flow to the sea."], 2, silent) == found[:1]


def test_no_such_rephraser(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"cannot load the rephraser.*\n.*{RULES!r}"):
        rephraser(tmp_path / "absent")
