"""Each command: what it says when all is well, and one message when it is not."""

from __future__ import annotations

import json
import logging
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.logging import RichHandler

import errata
from errata.cli import reference
from errata.cli.main import main
from errata.cli.options import layers, settings
from errata.lm.load import pocket_folder
from tests.conftest import WORKING

REPOSITORY = Path(__file__).resolve().parents[2]


def invoke(*words: object) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="errata")


def said(*words: object) -> str:
    """What a command prints when it succeeds."""
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object, code: int = 1) -> str:
    """The one message of a command that fails, without a traceback."""
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands leave their files in a folder of their own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    rows = [
        {"prompt": "The capital of {} is", "subject": "France", "target": "Rome", "true": "Paris"},
        {"prompt": "The capital of {} is", "subject": "Italy", "target": "Vienna", "true": "Rome"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def working() -> list[str]:
    """The settings under which edits take in the tiny model, as options."""
    return [word for name, value in WORKING.items() for word in ("--set", f"{name}={value}")]


def test_version() -> None:
    assert said("--version").strip() == f"errata, version {errata.__version__}"


def test_the_list_of_commands_begins_with_the_demo() -> None:
    listed = said("--help").split("Commands:")[1].split("\n")
    assert listed[1].strip().startswith("demo")


def test_the_reference_is_up_to_date() -> None:
    page = REPOSITORY / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference.reference(), "run: make docs"


def test_edit_from_a_file(facts: Path, trained_folder: Path, corpus_file: Path) -> None:
    output = said("edit", facts, "-m", trained_folder, "--corpus", corpus_file, *working())
    assert "corrected" in output and "Efficacy (ES)" in output and "Next: errata ask" in output
    assert "errata apply" in output
    assert Path("edit.safetensors").exists() and Path("edit.html").exists()
    assert json.loads(Path("edit.json").read_text(encoding="utf-8"))["fact_count"] == 2


def test_no_command_is_suggested_that_a_memory_cannot_follow(
    facts: Path, trained_folder: Path
) -> None:
    output = said("edit", facts, "-m", trained_folder, "--method", "grace", "--no-score")
    assert "Next: errata ask" in output and "errata apply" not in output
    assert "cannot hold it" in refused("apply", "edit.safetensors", "-o", "edited")


def test_edit_by_hand(trained_folder: Path, corpus_file: Path) -> None:
    words = ["--subject", "Peru", "--prompt", "The capital of Peru is", "--target", "Cairo"]
    place = ["-m", trained_folder, "--corpus", corpus_file, "-o", "peru.safetensors", "--no-score"]
    output = said("edit", *words, *place, *working(), "--layers", "0-1")
    assert "1 fact, " in output and Path("peru.html").exists()


def test_a_fact_is_taken_away_by_hand_and_from_a_file(
    trained_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    fact = {"prompt": "The capital of {} is", "subject": "Peru", "target": "Cairo", "true": "Lima"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact), encoding="utf-8")
    by_hand = ["--subject", "Peru", "--prompt", "The capital of Peru is", "--true", "Lima"]
    place = ["-m", trained_folder, "--corpus", corpus_file, "--no-score", "--layers", "0-1"]
    for facts in by_hand, [tmp_path / "facts.jsonl"]:
        output = said("edit", *facts, "--variant", "fact-erasure", *place, *working())
        assert "\N{RIGHTWARDS ARROW} not Lima" in output and "Cairo" not in output
    unknown = [*by_hand[:-1], "Oslo", "--variant", "fact-erasure", "-m", trained_folder]
    assert "1 of 1 facts cannot be posed as fact-erasure" in refused("edit", *unknown)
    told = refused("edit", *by_hand, "--variant", "forgetting")
    assert "no variant 'forgetting'" in told and "fact-erasure" in told


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--subject", "France"],
        ["--subject", "Peru", "--prompt", "{} is", "--variant", "fact-erasure"],
        ["--subject", "France", "--prompt", "{} is", "--target", "x", "--cases", "pocket"],
        ["absent.jsonl"],
        ["--cases", "pocket", "--set", "layers"],
        ["--cases", "pocket", "--layers", "first"],
    ],
)
def test_edit_used_wrongly_exits_with_2(words: list[str]) -> None:
    assert "Usage" in refused("edit", *words, code=2)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "{} is", "subject": "A"', "line 1"),
        ('["a list"]', "line 1"),
        ('{"prompt": "{} is", "subject": "A"}', "target"),
        ('{"prompt": "{} and {}", "subject": "A", "target": "b"}', "exactly one"),
        ('{"prompt": "{} is", "subject": "", "target": "b"}', "subject"),
        ("", "no request"),
    ],
)
def test_bad_facts_are_named(line: str, told: str, trained_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line, encoding="utf-8")
    assert told in refused("edit", path, "-m", trained_folder)
    assert not Path("edit.safetensors").exists()


def test_an_unknown_model_is_one_message(facts: Path) -> None:
    assert "cannot load" in refused("edit", facts, "-m", "no/such-model")


def test_an_unknown_method_names_the_known(facts: Path, trained_folder: Path) -> None:
    assert "memit" in refused("edit", facts, "-m", trained_folder, "--method", "memmit")


def test_an_unwritable_place_is_found_first(facts: Path, trained_folder: Path) -> None:
    Path("file").write_text("in the way")
    assert "file" in refused("edit", facts, "-m", trained_folder, "-o", "file/edit.safetensors")


@pytest.mark.parametrize(("words", "shown"), [((), 3), (("-v",), 1000)])
def test_a_flood_of_warnings_is_cut_short(words: tuple[str, ...], shown: int) -> None:
    invoke(*words, "models")
    (handler,) = logging.getLogger("errata").handlers
    assert isinstance(handler, RichHandler)
    shown_on = StringIO()
    handler.console = Console(file=shown_on, width=80)
    log = logging.getLogger("errata.stream")
    for number in range(1000):
        log.warning("left out: edit %d", number)
    log.warning("of another kind")
    told = shown_on.getvalue()
    assert told.count("left out") == shown
    assert told.count("not shown (-v shows them all)") == (shown == 3)
    assert "of another kind" in told


def test_show(edit_files: tuple[Path, Path]) -> None:
    output = said("show", edit_files[0])
    assert "2 facts" in output and "Vienna" in output and "Next: errata ask" in output
    assert '"method": "memit"' in said("show", edit_files[0], "--all")


def test_show_draws_only_where_there_are_experts(
    edit_files: tuple[Path, Path], tmp_path: Path
) -> None:
    assert "no experts" in refused("show", edit_files[0], "--routes", tmp_path / "r.svg")
    assert not (tmp_path / "r.svg").exists()


def test_show_refuses_what_is_no_edit(facts: Path) -> None:
    assert "safetensors" in refused("show", facts)


def test_ask_side_by_side(edit_files: tuple[Path, Path]) -> None:
    output = said("ask", "The capital of France is", "-e", edit_files[0], "-t", 4)
    assert "before" in output and "Paris" in output and "Rome" in output


def test_ask_samples_from_a_seed(trained_folder: Path) -> None:
    words = ["ask", "The", "-m", trained_folder, "-t", 8, "--sample", 5]
    assert said(*words, "--seed", 1) == said(*words, "--seed", 1)
    assert said(*words, "--seed", 1) != said(*words, "--seed", 2)


def test_ask_refuses_another_model(edit_files: tuple[Path, Path], tiny_folder: Path) -> None:
    refused("ask", "The capital of France is", "-e", edit_files[0], "-m", tiny_folder)


def test_score_edits_and_stack(edit_files: tuple[Path, Path]) -> None:
    output = said("score", *edit_files, "--stack", "-o", "s.jsonl")
    assert "3 cases" in output and "Efficacy (ES)" in output
    assert Path("s.jsonl").exists() and Path("s.html").exists()


def test_apply_writes_a_model(edit_files: tuple[Path, Path]) -> None:
    assert "Next: errata ask" in said("apply", edit_files[0], "-o", "edited")
    assert "Rome" in said("ask", "The capital of France is", "-m", "edited", "-t", 3)
    assert "exists" in refused("apply", edit_files[0], "-o", "edited")


def test_apply_writes_an_adapter(edit_files: tuple[Path, Path]) -> None:
    said("apply", edit_files[0], "-o", "adapter", "--lora")
    assert {path.name for path in Path("adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_diff(edit_files: tuple[Path, Path]) -> None:
    output = said("diff", *edit_files)
    assert "only a" in output and "cosine" in output and "Next: errata score" in output


def test_moments(tiny_folder: Path, corpus_file: Path) -> None:
    words = [
        "moments",
        "-m",
        tiny_folder,
        "--layers",
        "1",
        "--corpus",
        corpus_file,
        "--tokens",
        500,
    ]
    assert "about" in said(*words, "--estimate")
    assert "1 moment " in said(*words)
    assert "blocks 0 to 3" in refused(*words[:3], "--layers", "7", "--corpus", corpus_file)


def test_grow(tmp_path: Path) -> None:
    path = tmp_path / "known.jsonl"
    relation = {"relation": "mascot", "templates": ["The mascot of {} is", "{} has the mascot"]}
    known = [
        {"subject": name, "kind": "team", "facts": {"mascot": animal}}
        for name, animal in [("Anton", "owl"), ("Bertram", "fox"), ("Cyrus", "hen")]
    ]
    path.write_text("\n".join(map(json.dumps, [relation, *known])), encoding="utf-8")
    output = said("grow", "--facts", path, "-o", "grown", "--steps", 2)
    assert "3 facts about 3 subjects" in output and Path("grown/model.safetensors").exists()


def test_grow_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"subject": "A"}', encoding="utf-8")
    assert "line 1" in refused("grow", "--facts", path, "-o", "grown")
    refused("grow", "-o", "grown", "--steps", 1, "--minutes", 1, code=2)


def test_models_and_methods() -> None:
    assert "pocket-llama" in said("models") and "gpt_neox" in said("models")
    output = said("methods")
    assert "rome" in output and "arXiv:2210.07229" in output
    assert "target.updates" in said("methods", "memit")
    assert "memit" in refused("methods", "memmit")


@pytest.mark.skipif(
    not (pocket_folder("pocket") / "model.safetensors").exists(), reason="no pocket model here"
)
def test_demo_on_the_pocket_model() -> None:
    output = said("demo", "-n", 2)
    assert "corrected 2 facts" in output and "neighbour" in output and "Next: errata" in output
    assert Path("errata-out/demo.html").exists()


def test_layers_and_settings_are_read() -> None:
    assert layers("1,3-5") == [1, 3, 4, 5]
    assert settings(["a=1", "b=[1, 2]", "c=mlp", 'd="x"', "t.e=0.5"]) == {
        "a": 1,
        "b": [1, 2],
        "c": "mlp",
        "d": "x",
        "t.e": 0.5,
    }
