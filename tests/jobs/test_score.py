"""Judging: unedited, each edit, a stack; which cases are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.errors import DatasetError, RequestFileError
from errata.jobs.score import lines, meaning, recorded_lines, run
from errata.measure.score import COLUMNS
from tests.conftest import CAPITALS, TEMPLATES


@pytest.fixture
def counterfact(tmp_path: Path) -> Path:
    """Cases in CounterFact's own format, for all capitals; each new object is the next one."""
    objects = list(CAPITALS.values())
    records = [
        {
            "case_id": i,
            "requested_rewrite": {
                "prompt": TEMPLATES[0],
                "subject": country,
                "relation_id": "P36",
                "target_new": {"str": objects[(i + 1) % len(objects)]},
                "target_true": {"str": capital},
            },
            "paraphrase_prompts": [TEMPLATES[1].format(country)],
            "neighborhood_prompts": [TEMPLATES[0].format("Cuba")] if country != "Cuba" else [],
            "attribute_prompts": [],
            "generation_prompts": [],
        }
        for i, (country, capital) in enumerate(CAPITALS.items())
    ]
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_each_edit_and_the_unedited_model(
    edit_files: tuple[Path, Path], trained_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    result = run(trained_folder, files=edit_files, out=rows, report=tmp_path / "page.html")
    assert result.names == ("before", "a.safetensors", "b.safetensors")
    assert result.cases == 3
    efficacy = next(line for line in result.scores if line.name == "Efficacy (ES)")
    means = [round(e.mean, 3) for e in efficacy.estimates if e]
    assert means[0] == 0 and means[1] == pytest.approx(2 / 3, abs=1e-3)
    assert [json.loads(line)["edit"] for line in rows.read_text().splitlines()].count("before") == 3
    assert (tmp_path / "page.html").exists()


def test_a_stack_is_judged_as_one(edit_files: tuple[Path, Path], trained_folder: Path) -> None:
    result = run(trained_folder, files=edit_files, stack=True)
    assert result.names == ("before", "stack")
    efficacy = next(line for line in result.scores if line.name == "Efficacy (ES)")
    assert efficacy.estimates[1] is not None and efficacy.estimates[1].mean > 0


def test_an_unedited_model_on_published_data(trained_folder: Path, counterfact: Path) -> None:
    result = run(trained_folder, data=counterfact, count=4)
    assert result.names == ("before",) and result.cases == 4


def test_only_cases_that_were_edited(
    edit_files: tuple[Path, Path], trained_folder: Path, counterfact: Path
) -> None:
    about = run(trained_folder, files=edit_files[:1], data=counterfact)
    assert about.cases == 1 and not about.note  # France -> Rome
    other = run(trained_folder, files=edit_files[1:], data=counterfact, count=2)
    assert other.cases == 2 and "None" in other.note
    every = run(trained_folder, files=edit_files[:1], data=counterfact, every_case=True)
    assert every.cases == len(CAPITALS)


def test_unknown_data_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('[{"question": "why"}]')
    with pytest.raises(DatasetError, match="question"):
        run(trained_folder, data=tmp_path / "other.json")
    with pytest.raises(RequestFileError, match="no file"):
        run(trained_folder, data=tmp_path / "absent.json")


def test_every_metric_has_a_meaning() -> None:
    for name in COLUMNS:
        title, told = meaning(name)
        assert title and len(told) > 10


def test_recorded_scores_are_the_scores() -> None:
    recorded = recorded_lines(
        {"before": {"ES": [0.5, 0.1, 0.9, 4]}, "after": {"ES": [1, None, None, 1]}}
    )
    assert recorded[0].name == "Efficacy (ES)"
    assert recorded[0].estimates[0] is not None and recorded[0].estimates[0].n == 4
    assert lines([]) == ()
