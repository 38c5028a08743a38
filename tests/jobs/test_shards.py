"""Shards add up to what one process finds, however they are cut and wherever they are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from errata.editors import Background
from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.rome import Rome, RomeConfig
from errata.editors.closed_form.statistics import add_up, collect
from errata.editors.closed_form.targets import TargetConfig, optimise_targets
from errata.errors import ClusterError, ConfigError, EditStateError, MomentError
from errata.jobs import shards
from errata.jobs.methods import editor_for
from errata.jobs.shards import Source
from errata.measure.metrics import Consistency
from errata.measure.score import score
from errata.requests import Case, Request
from tests.conftest import CAPITALS, SENTENCES, TEMPLATES, WORKING, statements

PREFIXES = ("", "I read it. ")
CONFIG = TargetConfig(clamp=5.0, updates=8, stop_below=0.0)
TEXTS = [f"{line} {number}" for number in range(30) for line in [*SENTENCES, *statements()]]
TOKENS = 13_000


@pytest.fixture
def source(trained_folder: Path) -> Source:
    return Source(str(trained_folder))


@pytest.fixture
def requests() -> list[Request]:
    return [Request(TEMPLATES[0], country, "Paris") for country in CAPITALS if country != "France"]


@pytest.fixture
def cases(requests: list[Request]) -> list[Case]:
    return [
        Case(r, str(i), generation=(r.text,), references=(f"{r.subject} is near {r.target}, oh",))
        for i, r in enumerate(requests)
    ]


@pytest.fixture
def editor(source: Source) -> ClosedForm:
    background = Background([*SENTENCES, *statements()])
    made = editor_for(source.model(), "memit", WORKING | {"target.updates": 8}, background)
    assert isinstance(made, ClosedForm)
    return made


def check_targets(source: Source, requests: Sequence[Request], **places: Any) -> None:
    groups = [(requests[0], requests[1]), *((request,) for request in requests[2:])]
    told: list[int] = []
    found = shards.targets(
        source,
        groups,
        PREFIXES,
        1,
        CONFIG,
        size=2,
        progress=lambda stage, done, total: told.append(done),
        **places,
    )
    alone = optimise_targets(source.model(), groups, PREFIXES, 1, CONFIG, batch_tokens=16384)
    assert_close(found.deltas, alone.deltas, rtol=1e-5, atol=1e-5)
    assert_close(found.streams, alone.streams, rtol=1e-5, atol=1e-5)
    assert_close(found.loss, alone.loss, rtol=1e-4, atol=1e-5)
    assert found.failed.keys() == alone.failed.keys()
    assert told[-1] == len(groups) and len(told) == 3


def check_moments(source: Source, **places: Any) -> None:
    """Four windows of 256 documents, the last of them cut where the tokens end."""
    found = shards.moments(source, [0, 2], TEXTS, tokens=TOKENS, **places)
    alone = collect(source.model(), [0, 2], TEXTS, tokens=TOKENS)
    assert found.tokens == alone.tokens == TOKENS
    assert found.key == alone.key  # so that each finds the other's in the cache
    for layer in (0, 2):
        assert_close(found.mean(layer), alone.mean(layer), rtol=1e-6, atol=1e-12)  # kept in float32


def check_scores(source: Source, cases: Sequence[Case], **places: Any) -> None:
    found = shards.scores(source, cases, size=3, **places)
    alone = score(source.model(), cases)
    assert [row["case_id"] for row in found.rows] == [row["case_id"] for row in alone.rows]
    for ours, theirs in zip(found.rows, alone.rows, strict=True):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-5)
        assert ours["rewrite"][0]["says"] == theirs["rewrite"][0]["says"]
        assert ours["rewrite"][0]["hits"] == theirs["rewrite"][0]["hits"]


def test_targets_in_shards(source: Source, requests: list[Request]) -> None:
    check_targets(source, requests)


def test_moments_in_shares(source: Source) -> None:
    check_moments(source, workers=3)


def test_scores_in_shards(source: Source, cases: list[Case]) -> None:
    check_scores(source, cases)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("on", ["processes", "ray"])
def test_other_processes_find_the_same(
    source: Source, requests: list[Request], cases: list[Case], on: str
) -> None:
    if on == "ray":
        pytest.importorskip("ray")
    check_targets(source, requests, on=on, workers=2)
    check_moments(source, on=on, workers=2)
    check_scores(source, cases, on=on, workers=2)


def test_parts_of_moments_merge_without_loss(source: Source) -> None:
    """In float64, before the mean is rounded to float32 for keeping."""
    parts = []
    windows = [rows(source, start) for start in (0, 9)]
    whole = add_up(source.model(), [1], windows)
    for window in windows:
        parts.append(add_up(source.model(), [1], [window])[1])
    parts[0].merge(parts[1])
    assert parts[0].count == whole[1].count > 300
    assert_close(parts[0].mean(), whole[1].mean(), rtol=1e-12, atol=1e-15)


def rows(source: Source, start: int) -> list[list[int]]:
    encoded = source.model().tokenizer(TEXTS[start : start + 9])["input_ids"]
    return [list(row) for row in encoded]


def test_moments_are_cached_and_text_that_is_too_short_is_refused(
    source: Source, tmp_path: Path
) -> None:
    shards.moments(source, [1], TEXTS, tokens=600, cache=tmp_path)
    told: list[str] = []
    shards.moments(
        source,
        [1],
        TEXTS,
        tokens=600,
        cache=tmp_path,
        progress=lambda stage, done, total: told.append(stage),
    )
    assert told == []
    with pytest.raises(MomentError, match="has only"):
        shards.moments(source, [1], TEXTS[:2], tokens=600)


def test_an_edit_with_shared_targets_is_the_edit(
    source: Source, editor: ClosedForm, requests: list[Request]
) -> None:
    found = shards.edit(source, editor, requests)
    alone = editor.edit(source.model(), requests)
    assert found.requests == alone.requests
    for path, change in alone.changes.items():
        assert_close(found.changes[path].dense(), change.dense(), rtol=1e-3, atol=1e-5)


def test_an_edited_model_and_a_method_without_a_batch_are_refused(
    source: Source, editor: ClosedForm, requests: list[Request]
) -> None:
    lm = source.model()
    with editor.edit(lm, requests[:1]).applied(lm), pytest.raises(EditStateError, match="Undo it"):
        shards.edit(source, editor, requests)
    rome = Rome(RomeConfig(layers=(0,)), editor.background)
    with pytest.raises(ConfigError, match="one request after another"):
        shards.edit(source, rome, requests)


def test_targets_known_of_other_groups_are_refused(
    source: Source, editor: ClosedForm, requests: list[Request]
) -> None:
    lm = source.model()
    groups = editor.groups(lm, requests[:2])
    found = shards.targets(source, groups, [""], 1, CONFIG)
    known = {group: found.one(i) for i, group in enumerate(groups)}
    with pytest.raises(ConfigError, match="lack 1 of 3 groups"):
        editor.edit(lm, requests[:3], known=known)


def test_scores_of_an_edit_are_of_the_edited_model(
    source: Source, edit_files: tuple[Path, Path]
) -> None:
    cases = [Case(Request(TEMPLATES[0], "France", "Rome", "Paris"))]
    before = shards.scores(source, cases).rows[0]["metrics"]
    after = shards.scores(source, cases, edit=edit_files[0]).rows[0]["metrics"]
    assert (before["ES"], after["ES"]) == (0.0, 1.0)
    assert not source.model().applied


def test_consistency_is_counted_over_all_references(source: Source, cases: list[Case]) -> None:
    cases = cases[:2]
    found = shards.scores(source, cases, generation=True, size=1)
    over_all = Consistency([text for case in cases for text in case.references])
    for row, case in zip(found.rows, cases, strict=True):
        assert len(row["texts"]) == 1
        assert row["metrics"]["RS"] == over_all(row["texts"], case.references)
        assert row["metrics"]["RS"] != Consistency(case.references)(row["texts"], case.references)


def test_a_shard_that_fails_is_told(tmp_path: Path, requests: list[Request]) -> None:
    with pytest.raises(ClusterError, match=r"shard 1 of 2 failed: .*no such folder"):
        shards.targets(
            Source(str(tmp_path / "absent")), [(r,) for r in requests], [""], 1, CONFIG, size=4
        )
