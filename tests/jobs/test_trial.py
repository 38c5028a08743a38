"""A method on trial: every edit on the unedited model, failures counted and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from errata.errors import ConfigError, RequestError
from errata.jobs.cases import pocket_cases
from errata.jobs.trial import Trial, trial
from errata.lm.load import LanguageModel
from errata.requests import Case, Probe, Request
from tests.conftest import SENTENCES

CASES = [
    Case(
        Request("We travel to {}", subject, target, true),
        case_id=subject,
        neighbours=(Probe("The Nile flows to", "the"),),
    )
    for subject, target, true in (
        ("France", "Rome", "Paris"),
        ("Italy", "London", "Rome"),
        ("Vienna", "Danube", "Rhine"),
    )
]
SMALL = {"layers": [1], "prefixes": [], "target.updates": 10, "target.learning_rate": 0.3}


@pytest.mark.parametrize("batch", [1, 2])
def test_every_case_is_scored_after_an_edit_and_the_model_is_left_alone(
    tiny_gpt2: LanguageModel, tmp_path: Path, batch: int
) -> None:
    before = {name: value.clone() for name, value in tiny_gpt2.network.state_dict().items()}
    result = trial(
        tiny_gpt2,
        CASES,
        method="emmet",
        settings=SMALL | {"target.clamp": 6.0},
        corpus=SENTENCES * 20,
        batch=batch,
        out=tmp_path / "rows.jsonl",
    )
    assert (result.cases, result.failed) == (3, ())
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "case_id" in row]) == 3
    (efficacy,) = (line for line in result.scores if line.name == "Efficacy (ES)")
    assert efficacy.estimates[1] is not None and efficacy.estimates[1].mean > 0.5
    after = tiny_gpt2.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_failures_are_told_and_scored_on_the_unedited_model(tiny_gpt2: LanguageModel) -> None:
    stuck = SMALL | {"target.updates": 1, "target.learning_rate": 1e-9}
    result = trial(tiny_gpt2, CASES, method="rome", settings=stuck, corpus=SENTENCES * 20)
    assert len(result.failed) == 3
    assert "We travel to France" in result.failed[0]
    for line in result.scores:
        before, after = line.estimates
        assert before is not None and after is not None
        assert after.mean == pytest.approx(before.mean, abs=1e-5)


def test_bad_input_is_refused(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(RequestError, match="no case"):
        trial(tiny_gpt2, [], method="rome")
    with pytest.raises(ConfigError, match="no method 'rom'"):
        trial(tiny_gpt2, CASES, method="rom")


def _mean(result: Trial, name: str) -> float:
    (after,) = (line.estimates[1] for line in result.scores if line.name == name)
    assert after is not None
    return 100 * after.mean


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pocket", "pocket-llama"])
def test_the_pocket_models_can_be_edited(model: str) -> None:
    """Well under the measured scores (docs/results.md), so that only a real change fails."""
    cases = pocket_cases(40)
    rome = trial(model, cases, method="rome")
    assert _mean(rome, "Efficacy (ES)") > 95
    assert _mean(rome, "Generalisation (PS)") > 85
    assert _mean(rome, "Specificity (NS)") > 92
    memit = trial(model, cases, method="memit", batch=40)
    assert _mean(memit, "Efficacy (ES)") > 88
    assert _mean(memit, "Specificity (NS)") > 85
