"""`errata locate`, and layers that the facts choose, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.cli.options import edited_layers
from errata.jobs.locating import locate as job
from errata.locate.tracing import Traces
from tests.cli.test_cli import refused, said, working

FRANCE = ["--subject", "France", "--prompt", "The capital of {} is"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands leave their files in a folder of their own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    rows = [
        {"prompt": "The capital of {} is", "subject": "France", "target": "Rome", "true": "Paris"},
        {"prompt": "The capital of {} is", "subject": "Japan", "target": "Lima", "true": "Tokyo"},
        {"prompt": "The capital of {} is", "subject": "Italy", "target": "Vienna", "true": "Lima"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_tracing_one_fact(trained_folder: Path) -> None:
    output = said("locate", "tracing", "-m", trained_folder, *FRANCE, "--figure", "one.svg")
    assert "The capital of France is -> Paris" in output and "MLP" in output
    assert "--target TARGET --layers auto:tracing" in output
    found = job.load("tracing.json")
    assert isinstance(found, Traces) and len(found.traces) == 3
    assert Path("one.svg").exists() and "<svg" in Path("tracing.html").read_text(encoding="utf-8")


def test_tracing_several_facts(facts: Path, trained_folder: Path) -> None:
    words = ["--noise", 2, "--samples", 3, "--window", 1, "-o", "t.json", "--report", "page.html"]
    output = said("locate", "tracing", facts, "-m", trained_folder, *words)
    assert "2 facts" in output and "last token" in output
    assert "left out: " in output and "Rome" in output  # what the model says of Italy
    assert f"errata edit {facts} -m {trained_folder} --layers auto:tracing" in output
    found = job.load("t.json")
    assert isinstance(found, Traces) and found.traces[0].noise.samples == 3
    assert Path("page.html").exists() and not Path("t.html").exists()


def test_saliency(facts: Path, trained_folder: Path) -> None:
    output = said("locate", "saliency", facts, "-m", trained_folder, "--neutral", facts)
    assert "3 facts, compared with 3 neutral ones" in output
    assert "the most salient" in output and "auto:saliency" in output


def test_neurons(trained_folder: Path) -> None:
    words = [*FRANCE, "--true", "Paris", "--factor", 3]
    output = said("locate", "neurons", "-m", trained_folder, *words)
    assert "times 3" in output and "layer/neuron" in output
    assert Path("neurons.json").exists()


def test_versus(facts: Path, trained_folder: Path, corpus_file: Path) -> None:
    settings = [word for word in working() if not word.startswith("layers=")]
    settings.remove("--set")
    words = ["--corpus", corpus_file, "--layers", "0,2", *settings, "--method", "memit"]
    output = said("locate", "versus", facts, "-m", trained_folder, *words, "--figure", "v.png")
    assert "2 facts, each edited by memit" in output and "layer + tracing effect" in output
    assert Path("v.png").exists() and Path("versus.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["tracing", "--subject", "France"],
        ["tracing", "--target", "Rome"],
        ["tracing", "--cases", "pocket", *FRANCE],
        ["tracing", "--severed", "all"],
        ["versus", "--layers", "auto:tracing"],
        ["nowhere"],
    ],
)
def test_used_wrongly_exits_with_2(words: list[str], trained_folder: Path) -> None:
    assert "Usage" in refused("locate", *words, code=2)


def test_facts_must_be_named_for_other_models(trained_folder: Path) -> None:
    assert "--cases" in refused("locate", "tracing", "-m", trained_folder)


def test_unwritable_places_are_found_first(trained_folder: Path) -> None:
    words = ["locate", "tracing", "-m", trained_folder, *FRANCE]
    assert ".svg" in refused(*words, "--figure", "x.gif")
    Path("file").write_text("in the way")
    assert "file" in refused(*words, "-o", "file/x.json")


def test_edits_let_the_facts_choose(facts: Path, trained_folder: Path, corpus_file: Path) -> None:
    place = ["-m", trained_folder, "--corpus", corpus_file, "--no-score"]
    output = said("edit", facts, *place, *working(), "--layers", "auto:tracing")
    assert "auto:tracing: restoring" in output
    assert '"how": "tracing"' in said("show", "edit.safetensors", "--all")


def test_trials_let_the_facts_choose(facts: Path, trained_folder: Path, corpus_file: Path) -> None:
    place = ["-m", trained_folder, "--corpus", corpus_file, "--data", facts]
    assert "auto:saliency: the" in said("trial", *place, *working(), "--layers", "auto:saliency")


def test_layers_are_numbers_or_a_way() -> None:
    assert edited_layers("auto:tracing") == "auto:tracing"
    assert edited_layers("0-2") == [0, 1, 2]
    assert edited_layers(None) is None
    assert "auto:saliency" in refused("edit", "--cases", "pocket", "--layers", "auto:x", code=2)


def test_five_problems_go_on_where_they_stopped(facts: Path, trained_folder: Path) -> None:
    words = ["--method", "ft", "--variant", "fact-erasure", "--layers", 1, "-n", 2]
    words += ["--cases", facts, "--set", "ft.updates=3", "--seeds", "0,1", "--figure", "v.svg"]
    output = said("locate", "variants", "-m", trained_folder, *words)
    assert "fact-erasure" in output and "Rewrite score by layer" in output
    assert len(list(Path("variants.parts").iterdir())) == 2 and Path("v.svg").exists()
    assert said("locate", "variants", "-m", trained_folder, *words) == output
    assert "another study" in refused(
        "locate", "variants", "-m", trained_folder, *words, "--set", "ft.updates=4"
    )
