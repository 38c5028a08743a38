"""`errata run`: what it says of work that is done, failed, or only asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from errata.cli.main import main
from errata.errors import SolveError
from errata.jobs.studies import run as studies
from tests.jobs.working import experiment


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mine(tmp_path: Path, trained_folder: Path) -> str:
    (tmp_path / "experiments").mkdir()
    file = experiment(tmp_path, trained_folder)
    file.rename(tmp_path / "experiments" / "mine.toml")
    return "mine"


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["run", *words], prog_name="errata")


def test_a_run_ends_with_its_results_and_what_to_do_next(mine: str) -> None:
    result = invoke(mine)
    assert result.exit_code == 0, result.output
    assert "2 units done" in result.output and "0 were there already" in result.output
    assert "MEMIT" in result.output and "EMMET" in result.output and "PS" in result.output
    assert "Next: errata report mine" in result.output and "errata results mine" in result.output
    assert Path("results/mine.sqlite").exists()
    again = invoke(mine, "--only", "memit on")
    assert "0 units done" in again.output and "1 were there already" in again.output


def test_failures_are_told_and_are_the_exit_code(
    mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise SolveError("the keys are dependent.")

    monkeypatch.setattr(studies, "perform", failing)
    result = invoke(mine)
    assert result.exit_code == 1
    assert "2 failed" in result.output
    assert "failed: MEMIT on" in result.output and "the keys are dependent." in result.output
    assert "Traceback" not in result.output


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(mine: str) -> None:
    result = invoke(mine, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 units to do; 0 are done already" in result.output
    assert "measured" in result.output and "Next: errata run mine" in result.output
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (["mien"], "Did you mean 'mine'", 1),
        (["mine", "--only", "nothing"], "no unit has 'nothing'", 1),
        (["mine", "--on", "moon"], "'moon' is not one of", 2),
        (["mine", "--workers", "0"], "0 is not in the range", 2),
        (["mine", "--address", "auto"], "an address is one of a Ray cluster", 1),
        ([], "Missing argument", 2),
    ],
)
def test_bad_use_is_one_message(mine: str, words: list[str], told: str, code: int) -> None:
    result = invoke(*words)
    assert (result.exit_code, told in result.output) == (code, True), result.output
    assert "Traceback" not in result.output
