"""`errata fit` end to end on the tiny trained model, and what the command line says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from errata.algebra.low_rank import LowRank
from errata.cli.main import main
from errata.editors.background import Background
from errata.editors.config import EditorConfig
from errata.editors.editor import Editor
from errata.editors.fitted import load_editor
from errata.edits.edit import Edit, Record
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, FitError, StorageError, TargetError
from errata.jobs.edit import edit
from errata.jobs.fit import fit, fitted_methods, judged
from errata.jobs.trial import trial
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import Case, Probe, Request
from tests.conftest import TEMPLATES
from tests.editors.hypernet.capitals import capital_cases

SETTINGS: dict[str, Any] = {
    "network.rank": 32,
    "network.learning_rate": 0.1,
    "network.step_learning_rate": 0.3,
    "training.steps": 4,
    "training.validate_every": 2,
}


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


@pytest.fixture(scope="module")
def editor_file(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit") / "mend.safetensors"
    fit(trained_folder, capital_cases(), method="mend", settings=SETTINGS, out=out)
    return out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The cases in CounterFact's published form."""
    records = [
        {
            "case_id": number,
            "requested_rewrite": {
                "prompt": case.request.prompt,
                "subject": case.request.subject,
                "target_new": {"str": case.request.target},
                "target_true": {"str": case.request.true},
                "relation_id": "P36",
            },
            "paraphrase_prompts": list(case.paraphrases),
            "neighborhood_prompts": [f"The capital of Italy is not {number}, it is"],
            "attribute_prompts": [],
            "generation_prompts": [],
        }
        for number, case in enumerate(capital_cases())
    ]
    path = tmp_path / "capitals.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="errata")


def test_it_fits_judges_and_saves(trained_folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    stages: set[str] = set()
    out = tmp_path / "new" / "mend.safetensors"
    result = fit(
        lm,
        capital_cases(),
        method="mend",
        settings=SETTINGS,
        out=out,
        progress=lambda stage, done, total: stages.add(stage),
    )
    assert {"steps", "judging"} <= stages
    assert set(result.scores) == {"EA", "EA.rewrite", "EA.paraphrases", "DD", "DD.perplexity"}
    assert all(0 <= result.scores[name].mean <= 1 for name in ("EA", "EA.rewrite"))
    assert len(result.cases.validation) == result.scores["EA"].n == 7  # one country
    kept = load_editor(out, LanguageModel.load(trained_folder)).fit.notes
    assert kept["scores"]["EA"] == list(result.scores["EA"])
    assert [v["step"] for v in result.curve()] == [2, 4]
    assert result.training["steps"] == 4 and result.file_bytes == out.stat().st_size
    assert [line.percent for line in result.lines] == [True] * 4 + [False]


def test_the_same_fit_gives_the_same_file(
    trained_folder: Path, editor_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "other-name.safetensors"
    fit(trained_folder, capital_cases(), method="mend", settings=SETTINGS, out=out)
    assert out.read_bytes() == editor_file.read_bytes()


def test_an_earlier_fit_is_gone_on_with_only_if_asked(
    trained_folder: Path, lm: LanguageModel, tmp_path: Path
) -> None:
    out = tmp_path / "mend.safetensors"
    fit(lm, capital_cases(), method="mend", settings=SETTINGS, out=out)
    with pytest.raises(FitError, match=r"mend\.fit holds the checkpoint.*--resume"):
        fit(lm, capital_cases(), method="mend", settings=SETTINGS, out=out)
    longer = SETTINGS | {"training.steps": 6}
    done: list[int] = []
    result = fit(
        lm,
        capital_cases(),
        method="mend",
        settings=longer,
        out=out,
        resume=True,
        progress=lambda stage, made, total: done.append(made) if stage == "steps" else None,
    )
    assert done[0] == 4 and result.training["steps"] == 6
    whole = tmp_path / "whole.safetensors"
    fit(lm, capital_cases(), method="mend", settings=longer, out=whole)
    assert whole.read_bytes() == out.read_bytes()
    with pytest.raises(FitError, match="another fit"):
        fit(lm, capital_cases()[1:], method="mend", settings=SETTINGS, out=out, resume=True)


def test_what_cannot_be_fitted_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match=r"memit needs no fitting.*mend, salem"):
        fit(lm, capital_cases(), method="memit", out=out)
    with pytest.raises(FitError, match="at least two"):
        fit(lm, capital_cases()[:1], method="mend", out=out)
    with pytest.raises(ConfigError, match="has no"):
        fit(lm, capital_cases(), method="mend", settings={"stepps": 3}, out=out)
    with pytest.raises(StorageError, match="is a folder"):
        fit(lm, capital_cases(), method="mend", out=tmp_path)
    assert {"mend", "salem"} <= set(fitted_methods()) and "memit" not in fitted_methods()


class Eraser(Editor):
    """Writes over whatever the last block says; fails on Italy."""

    name = "eraser"
    depth = (1.0, 1.0)

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> Edit:
        if requests[0].subject == "Italy":
            raise TargetError("not Italy")
        path = lm.mlp_out_path(-1)
        d_out, d_in = weight_out_in(lm.module(path)).shape
        noise = LowRank(30 * torch.randn(d_out, 1), torch.ones(1, d_in))
        return WeightEdit.of(lm, {path: noise}, requests=requests, record=Record())


def test_any_editor_is_judged_and_drawdown_counts_what_it_ruins(lm: LanguageModel) -> None:
    cases = [
        Case(
            Request(TEMPLATES[0], country, target, true),
            paraphrases=(TEMPLATES[1].format(country),),
            neighbours=(Probe("The capital of Spain is", "Madrid"),),
        )
        for country, target, true in (("France", "Rome", "Paris"), ("Italy", "Rome", "Rome"))
    ]
    scores = judged(lm, Eraser(EditorConfig(), Background()), cases)
    assert scores["DD"].mean == 0.5  # where it fails, the unedited model answers: right, here
    assert scores["DD.perplexity"].mean > 1
    assert scores["EA.rewrite"].mean == scores["EA.paraphrases"].mean == scores["EA"].mean == 0.5
    bare = judged(lm, Eraser(EditorConfig(), Background()), [Case(cases[0].request)])
    assert set(bare) == {"EA", "EA.rewrite"}
    assert not lm.applied


def test_edits_and_trials_with_a_fitted_editor(
    trained_folder: Path, lm: LanguageModel, editor_file: Path
) -> None:
    cases = capital_cases()[:4]
    change = edit(lm, [cases[0].request], fitted=editor_file)
    assert change.record.method == "mend"
    found = trial(lm, cases, method="memit", fitted=editor_file)
    assert found.method == "mend" and found.cases == 4 and not found.failed


def test_the_command_line_fits_and_edits(
    trained_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [w for name, value in SETTINGS.items() for w in ("--set", f"{name}={value}")]
    done = invoke("fit", "mend", "-m", trained_folder, "--data", data, "--steps", 2, *settings[:-4])
    assert done.exit_code == 0, done.output
    for words in ("in 2 steps", "all 2 steps are made", "EA.rewrite", "DD", "mend.safetensors"):
        assert words in done.output
    assert f"errata trial --editor mend.safetensors -m {trained_folder}" in done.output
    assert (tmp_path / "mend.fit").is_dir()
    again = invoke("fit", "mend", "-m", trained_folder, "--data", data)
    assert again.exit_code == 1 and "--resume" in again.output
    by_hand = ["--subject", "France", "--prompt", "The capital of {} is", "--target", "Rome"]
    common = ["-m", trained_folder, "--editor", "mend.safetensors"]
    edited = invoke("edit", *by_hand, *common, "--no-score")
    assert edited.exit_code == 0, edited.output
    assert "1 fact" in edited.output
    both = invoke("edit", *by_hand, *common, "--method", "rome")
    assert both.exit_code == 2 and "--method cannot be given with --editor" in both.output
    tried = invoke("trial", *common, "--data", data, "-n", 3)
    assert tried.exit_code == 0 and "mend on" in tried.output


def test_an_unfitted_method_says_to_fit_first(trained_folder: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        json.dumps({"prompt": "The capital of {} is", "subject": "France", "target": "Rome"})
    )
    done = invoke("edit", facts, "-m", trained_folder, "--method", "mend", "-o", tmp_path / "e")
    assert done.exit_code == 1 and "errata fit mend -m" in done.output
    assert "Traceback" not in done.output
