"""The main job: facts in, an edit and its proof out, the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from errata.edits.file import load_edit
from errata.errors import ConfigError, RequestError, StorageError, TargetError
from errata.jobs.edit import edit, run
from errata.lm.load import LanguageModel
from errata.requests import Case, Probe, Request
from tests.conftest import CAPITALS, TEMPLATES, WORKING

FRANCE = Request(TEMPLATES[0], "France", "Rome", "Paris")


def case(country: str, target: str) -> Case:
    neighbour = "Cuba"
    return Case(
        Request(TEMPLATES[0], country, target, CAPITALS[country]),
        paraphrases=(TEMPLATES[1].format(country),),
        neighbours=(Probe(TEMPLATES[0].format(neighbour), CAPITALS[neighbour]),),
    )


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def test_the_whole_job(lm: LanguageModel, corpus_file: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in lm.network.state_dict().items()}
    stages: set[str] = set()
    result = run(
        lm,
        [case("France", "Rome"), case("Italy", "Vienna")],
        settings=WORKING,
        corpus=corpus_file,
        out=tmp_path / "edit.safetensors",
        report=tmp_path / "edit.html",
        progress=lambda stage, done, total: stages.add(stage),
    )

    assert all(torch.equal(before[name], t) for name, t in lm.network.state_dict().items())
    france = result.facts[0]
    assert france.said[0].verdict == "corrected"
    assert france.said[0].before.strip().startswith("Paris")
    assert [said.kind for said in france.said] == ["prompt", "paraphrase", "neighbour"]
    efficacy = next(line for line in result.scores if line.name.startswith("Efficacy"))
    assert efficacy.estimates[0] is not None and efficacy.estimates[0].mean == 0
    assert efficacy.estimates[1] is not None and efficacy.estimates[1].mean == 1
    assert {"loading the model", "asking before", "asking after"} <= stages

    saved = load_edit(result.file)
    assert saved.requests == result.edit.requests
    assert saved.record.scores is not None and set(saved.record.scores) == {"before", "after"}
    page = json.loads((tmp_path / "edit.json").read_text(encoding="utf-8"))
    assert page["fact_count"] == 2 and len(page["changes"]) == 2
    assert (tmp_path / "edit.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_without_scores_it_still_asks(lm: LanguageModel, corpus_file: Path, tmp_path: Path) -> None:
    result = run(
        lm, [Case(FRANCE)], settings=WORKING, corpus=corpus_file, scored=False, out=tmp_path / "e"
    )
    assert result.scores == () and result.report is None
    assert result.facts[0].said[0].right


def test_keep_going_leaves_out_what_fails(
    lm: LanguageModel, corpus_file: Path, tmp_path: Path
) -> None:
    stuck = Case(Request(TEMPLATES[0], "Japan", "zq xv zq xv zq xv", "Tokyo"))
    settings = WORKING | {"target.updates": 2, "target.clamp": 0.001}
    easy = Case(Request(TEMPLATES[0], "France", "Paris"))  # said already: nothing to move
    with pytest.raises(TargetError, match="zq"):
        run(lm, [easy, stuck], settings=settings, corpus=corpus_file, out=tmp_path / "e")
    assert not (tmp_path / "e").exists()
    result = run(
        lm,
        [easy, stuck],
        settings=settings | {"keep_going": True},
        corpus=corpus_file,
        out=tmp_path / "e",
    )
    assert [request.subject for request in result.left_out] == ["Japan"]
    assert [request.subject for request in result.edit.requests] == ["France"]


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("rom", {}, "rome"),
        ("memit", {"layer": [1]}, "layers"),
        ("memit", {"layers": [9]}, "0 to 3"),
        ("memit", {"target.updatse": 4}, "updates"),
        ("memit", {"relaxation": "much"}, "MemitConfig"),
    ],
)
def test_settings_are_checked_by_name(
    lm: LanguageModel, corpus_file: Path, method: str, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        edit(lm, [FRANCE], method=method, settings=settings, corpus=corpus_file)


def test_contradictions_are_refused_by_name(lm: LanguageModel, corpus_file: Path) -> None:
    other = Request(TEMPLATES[0], "France", "Cairo")
    with pytest.raises(RequestError, match="Cairo"):
        edit(lm, [FRANCE, other], settings=WORKING, corpus=corpus_file)


def test_a_place_that_cannot_be_written_is_found_first(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    calls: list[str] = []
    with pytest.raises(StorageError):
        run(
            lm,
            [Case(FRANCE)],
            out=tmp_path / "file" / "edit.safetensors",
            progress=lambda stage, done, total: calls.append(stage),
        )
    assert calls == []
