"""`errata results` and `errata report`, on results that are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from errata.cli.main import main
from tests.jobs.made_up import EXPERIMENT, answers, row, saved


def invoke(*words: object, code: int = 0) -> str:
    """What a command prints."""
    environment = {"COLUMNS": "200"}
    result = CliRunner(env=environment).invoke(main, [str(w) for w in words], prog_name="errata")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an experiment that has results, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    saved(tmp_path / "experiments")
    (tmp_path / "results").mkdir()
    for file in (tmp_path / "experiments").glob("made-up.sqlite*"):
        file.rename(tmp_path / "results" / file.name)
    return "made-up"


def line(output: str, *words: str) -> str:
    (found,) = (one for one in output.splitlines() if one.split()[: len(words)] == [*words])
    return found


def test_results_are_a_line_for_each_unit(study: str) -> None:
    output = invoke("results", study)
    assert "Made up" in output and "Next: errata report made-up" in output
    assert line(output, "model", "editor", "batch").split() == [
        *("model", "editor", "batch", "S", "ES", "PS", "NS")
    ]
    assert "100.0 [91.2, 100.0]" in line(output, "pocket", "MEMIT", "1")
    assert "57.5 [44.1, 70.9]" in line(output, "pocket-llama", "EMMET", "16")
    assert "lack" not in output


def test_a_narrow_terminal_has_intervals_below(study: str) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["results", study])
    assert result.exit_code == 0 and "[91.2, 100.0]" in result.output  # not cut in two
    assert "100.0 [91.2" not in result.output


def test_results_can_be_chosen(study: str) -> None:
    output = invoke(
        "results", study, "--where", "model=pocket", "--where", "protocol.batch=[4,16]",
        "--metrics", "ES, NS",
    )  # fmt: skip
    assert "pocket-llama" not in output and "unedited" not in output
    assert output.count("MEMIT") == output.count("EMMET") == 2
    assert line(output, "model", "editor").split()[-2:] == ["ES", "NS"]


def test_two_editors_compared(study: str) -> None:
    output = invoke(
        "results", study, "--compare", "MEMIT", "EMMET", "--metrics", "S,ES", "--where",
        "model=pocket",
    )  # fmt: skip
    assert line(output, "pocket", "1", "ES").split()[3:5] == ["100.0", "100.0"]
    worse = line(output, "pocket", "16", "ES").split()
    assert worse[3:6] == ["100.0", "57.5", "42.5"]
    assert float(worse[-2]) < 0.001 and worse[-1] == "40"
    assert len([one for one in output.splitlines() if one.startswith("pocket")]) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "MEMIT", "EMMIT"], "no editor 'EMMIT'; there are MEMIT, EMMET"),
        (["--where", "modle=pocket"], "Did you mean 'model'"),
        (["--where", "model=gpt2"], "nothing here has gpt2"),
        (["--metrics", "ESS"], "there is no 'ESS'"),
        (["--export", "x.xlsx"], "cannot export to x.xlsx"),
    ],
)
def test_what_does_not_exist_is_named(study: str, words: list[str], message: str) -> None:
    assert message in " ".join(invoke("results", study, *words, code=1).split())


def test_a_where_without_a_value_is_refused(study: str) -> None:
    assert "--where" in invoke("results", study, "--where", "model", code=2)


def test_results_for_other_programs(study: str) -> None:
    invoke("results", study, "--export", "out.csv", "--where", "editor=EMMET")
    with open("out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 and {row["unit.label"] for row in rows} == {"EMMET"}
    invoke("results", study, "--export", "cases.csv", "--lines", "cases")
    with open("cases.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 28 * 30
    invoke("results", study, "--export", "out.jsonl")
    told = [json.loads(one) for one in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert len(told) == 28 and told[0]["unit"]["model"] == "pocket"


def test_a_report_is_a_page_and_markdown(study: str) -> None:
    output = invoke("report", study)
    assert "28 of 28 runs are done" in output and "Next: errata results made-up" in output
    for name in ("made-up.html", "made-up.md"):
        assert f"results/{name}" in output
        assert "Made up" in Path("results", name).read_text(encoding="utf-8")
    invoke("report", study, "-o", "elsewhere/page.html")
    assert Path("elsewhere/page.md").exists()


def test_what_is_not_done_is_told(tmp_path: Path) -> None:
    file = saved(
        tmp_path,
        measured=lambda unit: row(unit, answers(unit)) if unit.seed == 0 else None,
    )
    output = invoke("results", file, "--folder", tmp_path)
    assert "14 of 28 runs have failed or are not done" in output
    assert "100.0* [" in line(output, "pocket", "MEMIT", "1")
    output = invoke("report", file, "--folder", tmp_path)
    assert "14 of 28" in output and f"Next: errata run {file}" in "".join(output.splitlines())


def test_no_results_yet(tmp_path: Path) -> None:
    file = tmp_path / "new.toml"
    file.write_text(EXPERIMENT, encoding="utf-8")
    for command in ("results", "report"):
        output = invoke(command, file, "--folder", tmp_path, code=1)
        assert "errata run" in output
