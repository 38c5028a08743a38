"""One unit of a study: what each protocol writes, when it scores, and that nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.edits.weights import WeightEdit
from errata.errors import (
    ConfigError,
    DatasetError,
    ModelLoadError,
    NotFiniteError,
    RequestError,
)
from errata.jobs.cases import sample_cases
from errata.jobs.cluster import held
from errata.jobs.methods import editor_for
from errata.jobs.moments import background_for
from errata.jobs.studies.protocols import Outcome, perform
from errata.jobs.studies.scoring import consistent
from errata.jobs.studies.units import UNEDITED
from errata.lm.load import LanguageModel
from errata.measure.metrics import Consistency
from errata.measure.score import score
from tests.conftest import WORKING
from tests.jobs.working import means, unit, write_cases

STUCK = {**WORKING, "target.updates": 1, "target.learning_rate": 1e-9, "target.stop_below": 0.0}


def done(folder: Path, model: Path, **fields: Any) -> Outcome:
    return perform(unit(folder, model, **fields), folder=folder / "stream")


def test_single_is_edit_score_undo_for_each_case(tmp_path: Path, trained_folder: Path) -> None:
    before = {n: w.clone() for n, w in held(str(trained_folder)).network.state_dict().items()}
    found = done(tmp_path, trained_folder)
    cases = sample_cases(tmp_path / "cases.json", 4, 0)
    lm = LanguageModel.load(trained_folder)
    memit = editor_for(lm, "memit", WORKING, background_for(lm, tmp_path / "corpus.txt"))
    for case, row in zip(cases, found.cases, strict=True):
        with memit.edit(lm, [case.request]).applied(lm):
            (alone,) = score(lm, [case], protocols=["probability"]).rows
        assert row["case_id"] == case.case_id and "failed" not in row
        assert row["metrics"] == pytest.approx(alone["metrics"], abs=1e-3)
    after = held(str(trained_folder)).network.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert found.record["seeds"] == {"cases": 0, "editor": 0}
    assert (found.record["cases"], found.record["failed"]) == (4, 0)
    assert found.record["config"]["layers"] == [0, 1]
    assert set(found.record["seconds"]) == {"loading", "preparing", "editing", "scoring"}
    assert found.record["versions"]["torch"] and found.record["peak_memory"]


def test_a_batch_is_written_at_once_and_the_next_on_the_unedited_model(
    tmp_path: Path, trained_folder: Path
) -> None:
    found = done(tmp_path, trained_folder, protocol="batch", batch=3)
    cases = sample_cases(tmp_path / "cases.json", 4, 0)
    lm = LanguageModel.load(trained_folder)
    memit = editor_for(lm, "memit", WORKING, background_for(lm, tmp_path / "corpus.txt"))
    expected: list[dict[str, Any]] = []
    for batch in cases[:3], cases[3:]:
        with memit.edit(lm, [case.request for case in batch]).applied(lm):
            expected += score(lm, batch, protocols=["probability"]).rows
    for row, told in zip(found.cases, expected, strict=True):
        assert row["metrics"] == pytest.approx(told["metrics"], abs=1e-3)


def test_facts_may_choose_the_layers(tmp_path: Path, trained_folder: Path) -> None:
    settings = WORKING | {"layers": "auto:saliency"}
    found = done(tmp_path, trained_folder, count=2, settings=settings)
    layers = found.record["config"]["layers"]
    assert found.record["layers"].startswith("auto:saliency: the edits' gradients")
    assert (
        layers == list(range(layers[0], layers[-1] + 1))
        and str(layers[0]) in found.record["layers"]
    )
    named = done(tmp_path, trained_folder, count=2, settings=WORKING | {"layers": layers})
    assert means(named) == pytest.approx(means(found), abs=1e-3) and "layers" not in named.record


def test_what_an_edit_changes_is_told(tmp_path: Path, trained_folder: Path) -> None:
    edits = done(tmp_path, trained_folder).record["edits"]
    # Changes of the second matrix of two blocks of width 32; rank one, so they are small.
    assert (edits["made"], edits["parameters"]) == (4, 2 * 32 * 128)
    assert 2 * 4 * (32 + 128) <= edits["bytes"] < 4 * edits["parameters"]


@pytest.mark.parametrize("how", [{}, {"protocol": "sequential"}])
def test_an_edited_model_is_compared_with_the_unedited_one(
    how: dict[str, Any], tmp_path: Path, trained_folder: Path
) -> None:
    found = done(tmp_path, trained_folder, metrics=("editing", "answers"), **how)
    names = {"EA", "DD", "DD.perplexity", "Reliability", "Generality", "Generality.forced"}
    assert names <= found.metrics.keys() and "ES" not in found.metrics
    assert "Locality" not in found.metrics  # the unedited model answers no neighbour as cases say
    assert found.metrics["Reliability"].mean > 0.4
    plain = means(done(tmp_path, trained_folder, metrics=("editing",), method="none", settings={}))
    assert plain["DD"] == 0 and plain["EA"] == 0
    if how:
        assert {f"immediate.{name}" for name in names} <= found.metrics.keys()
        assert {"Generality", "retention"} <= found.points[-1]["metrics"].keys()


def test_the_unedited_model_is_scored_as_it_is(tmp_path: Path, trained_folder: Path) -> None:
    found = means(done(tmp_path, trained_folder, method=UNEDITED, settings={}))
    assert found["ES"] == 0.0 and found["PS"] == 0.0
    edited = means(done(tmp_path, trained_folder))
    assert edited["ES"] > 0.4


def test_seeds_draw_other_cases_and_the_same_seed_the_same(
    tmp_path: Path, trained_folder: Path
) -> None:
    first, second, again = (
        done(tmp_path, trained_folder, method=UNEDITED, settings={}, seed=seed)
        for seed in (0, 1, 0)
    )
    assert [row["case_id"] for row in first.cases] != [row["case_id"] for row in second.cases]
    assert first.cases == again.cases


def test_the_seed_is_the_editors_too_unless_the_settings_have_one(
    tmp_path: Path, trained_folder: Path
) -> None:
    told = [
        done(tmp_path, trained_folder, count=1, seed=3, settings=WORKING | more).record["seeds"]
        for more in ({}, {"seed": 7})
    ]
    assert told == [{"cases": 3, "editor": 3}, {"cases": 3, "editor": 7}]


@pytest.mark.parametrize("how", [{}, {"protocol": "batch", "batch": 2}, {"protocol": "sequential"}])
def test_what_fails_is_counted_and_scored_on_the_unedited_model(
    tmp_path: Path, trained_folder: Path, how: dict[str, Any]
) -> None:
    found = done(tmp_path, trained_folder, settings=STUCK, **how)
    plain = done(tmp_path, trained_folder, method=UNEDITED, settings={})
    assert found.record["failed"] == 4 and all(row["failed"] for row in found.cases)
    assert "did not move" in found.record["failures"][0]
    for name, mean in means(plain).items():
        assert means(found)[name] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("how", ["batch", "sequential"])
def test_an_edit_that_breaks_the_model_has_failed(
    how: str, tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = iter([False, True, False, False])

    def apply_(edit: WeightEdit, lm: LanguageModel, **_: Any) -> None:
        if next(broken):
            raise NotFiniteError("the weights overflow.")
        apply(edit, lm)

    apply = WeightEdit.apply_
    plain = done(tmp_path, trained_folder, method=UNEDITED, settings={})
    monkeypatch.setattr(WeightEdit, "apply_", apply_)
    found = done(tmp_path, trained_folder, protocol=how, batch=2)
    assert [row.get("failed", False) for row in found.cases] == [False, False, True, True]
    assert found.record["failures"] == ["the weights overflow."]
    if how == "batch":
        for row, told in zip(found.cases[2:], plain.cases[2:], strict=True):
            assert row["metrics"] == pytest.approx(told["metrics"], abs=1e-4)


def test_other_metrics_are_measured_where_they_are_asked_for(
    tmp_path: Path, trained_folder: Path
) -> None:
    only = done(tmp_path, trained_folder, count=2, metrics=("teacher-forced",))
    assert "rewrite.answer" in only.metrics and "ES" not in only.metrics
    assert "GE" not in only.metrics


def test_free_text_is_written_of_so_many_cases(tmp_path: Path, trained_folder: Path) -> None:
    found = done(tmp_path, trained_folder, generation=True, generation_count=3)
    assert found.metrics["GE"].n == found.metrics["RS"].n == 3
    assert ["GE" in row["metrics"] for row in found.cases] == [True, True, True, False]
    assert all("texts" not in row for row in found.cases)


def test_consistency_does_not_depend_on_how_cases_are_put_into_batches(tmp_path: Path) -> None:
    """Words are weighed over the references of all cases; over those of one, RS would differ."""
    cases = sample_cases(write_cases(tmp_path / "cases.json"), 4, 0)
    text = ["The river flows. France lies on it."]
    rows: list[dict[str, Any]] = [
        {"case_id": case.case_id, "texts": text, "metrics": {}} for case in cases
    ]
    consistent(rows, cases)
    references = dict.fromkeys(text for case in cases for text in case.references)
    of_all = Consistency(list(references))
    of_one = Consistency(cases[0].references)
    measured = rows[0]["metrics"]["RS"]
    assert measured == pytest.approx(of_all(text, cases[0].references))
    assert measured != pytest.approx(of_one(text, cases[0].references))


def test_pocket_cases_are_known_by_their_fact() -> None:
    ids = [case.case_id for case in sample_cases("pocket", 50, 0)]
    assert len(set(ids)) == 50 and all(" | " in one for one in ids)
    assert set(ids) & {case.case_id for case in sample_cases("pocket", None, 1)}


def test_a_prompt_is_in_a_sample_once(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    row = '{"prompt": "{} is in", "subject": "Rome", "target": "%s"}\n'
    path.write_text(row % "Peru" + row % "Cuba", encoding="utf-8")
    (case,) = sample_cases(path, None, 0)
    assert case.case_id == "Rome is in"
    with pytest.raises(DatasetError, match="has 1 cases with different prompts; 2 were asked"):
        sample_cases(path, 2, 0)


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"count": 9}, DatasetError, "has 8 cases.*9 were asked for"),
        ({"count": None, "protocol": "batch", "batch": 9}, RequestError, "batch of 9.*8 cases"),
        ({"model": "./nowhere"}, ModelLoadError, "no such folder"),
        ({"settings": WORKING | {"layers": [9]}}, ConfigError, "blocks 0 to 3, not 9"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, trained_folder: Path, fields: dict[str, Any], error: type, told: str
) -> None:
    with pytest.raises(error, match=told):
        perform(unit(tmp_path, trained_folder, **fields), folder=tmp_path)


def test_no_cases(tmp_path: Path, trained_folder: Path) -> None:
    asked = unit(tmp_path, trained_folder)
    write_cases(tmp_path / "cases.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DatasetError, match="empty list"):
        perform(asked, folder=tmp_path)


def test_cases_are_posed_as_another_problem(tmp_path: Path, trained_folder: Path) -> None:
    asked: dict[str, Any] = {"variant": "fact-erasure", "metrics": ("shares",)}
    found = done(tmp_path, trained_folder, **asked)
    told = means(found)
    assert 0 < told["S.share"] <= 1 and told["rewrite.share"] > 0.2
    assert found.record["not posed"] == [] and found.record["failed"] == 0
    unedited = means(done(tmp_path, trained_folder, method=UNEDITED, **asked))
    assert (unedited["rewrite.share"], unedited["neighbours.share"]) == (0.0, 1.0)
