"""Sequential streams: edits stack up, are watched, and survive whatever ends the process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.edits.edit import Edit
from errata.edits.file import load_edit
from errata.edits.stack import Stack
from errata.errors import EditFileError, StorageError
from errata.jobs import score as judging
from errata.jobs.cases import sample_cases
from errata.jobs.cluster import held
from errata.jobs.files import write_text
from errata.jobs.studies import stream as module
from errata.jobs.studies.protocols import Outcome, perform
from errata.jobs.studies.scoring import scored
from errata.jobs.studies.units import Unit
from errata.lm.load import LanguageModel
from tests.conftest import WORKING
from tests.jobs.working import means, unit


def asked(folder: Path, trained: Path, **fields: Any) -> Unit:
    usual = {"protocol": "sequential", "batch": 2, "count": 6}
    quick = {"settings": WORKING | {"target.updates": 15, "target.learning_rate": 0.2}}
    return unit(folder, trained, **usual | quick | fields)


def same(a: Outcome, b: Outcome) -> bool:
    """Equal to the last bit, but for the times and what only an interrupted run knows."""
    return (a.metrics, a.cases, a.points) == (b.metrics, b.cases, b.points) and all(
        a.record[name] == b.record[name] for name in ("config", "failed", "failures", "stopped")
    )


class Killed(Exception):
    """As if the process had ended here."""


@pytest.fixture(autouse=True)
def _little_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "NEUTRAL", 4)


@pytest.fixture(autouse=True)
def _held_as_it_was(trained_folder: Path) -> Iterator[None]:
    before = {n: w.clone() for n, w in held(str(trained_folder)).network.state_dict().items()}
    yield
    lm = held(str(trained_folder))
    assert not lm.applied and not lm.originals
    after = lm.network.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_each_batch_is_written_on_top_of_the_others(tmp_path: Path, trained_folder: Path) -> None:
    one = asked(tmp_path, trained_folder)
    found = perform(one, folder=tmp_path / "stream")
    edits = [load_edit(file) for file in sorted((tmp_path / "stream").glob("*.safetensors"))]
    assert [len(edit.requests) for edit in edits] == [2, 2, 2]
    lm = LanguageModel.load(trained_folder)
    cases = sample_cases(one.data, 6, 0)
    with edits[0].applied(lm):
        first = scored(lm, cases[:2], one, {})
    with Stack(edits).applied(lm):
        final = scored(lm, cases, one, {})
    for row, told in zip(found.cases, final, strict=True):
        assert {n: row["metrics"][n] for n in told["metrics"]} == told["metrics"]
    for row, told in zip(found.cases, first, strict=False):
        assert row["metrics"]["immediate.EM"] == told["metrics"]["EM"]
    assert means(found)["immediate.ES"] == pytest.approx(
        sum(row["metrics"]["immediate.ES"] for row in found.cases) / 6
    )


def test_a_point_tells_of_everything_so_far(tmp_path: Path, trained_folder: Path) -> None:
    found = perform(asked(tmp_path, trained_folder), folder=tmp_path / "stream")
    assert [(point["edits"], point["batches"]) for point in found.points] == [
        (2, 1),
        (4, 2),
        (6, 3),
    ]
    first, last = found.points[0]["metrics"], found.points[-1]["metrics"]
    assert "retention" not in first  # there is nothing earlier
    took = [row["metrics"] for row in found.cases[:4] if row["metrics"]["immediate.ES"] == 1.0]
    assert last["retention"][0] == pytest.approx(sum(m["ES"] for m in took) / len(took))
    assert last["ES"][0] == pytest.approx(means(found)["ES"])
    assert last["ES"][3] == 6
    assert last["perplexity ratio"][0] != 1.0
    assert last["KL neighbours"][0] > 0 and last["KL text"][0] > 0
    norms = [list(point["norms"].values()) for point in found.points]
    assert len(norms[0]) == 2 and all(norm > 0 for norm in norms[0])
    json.dumps(found.points)


def test_everything_is_scored_every_so_many_batches_and_at_the_end(
    tmp_path: Path, trained_folder: Path
) -> None:
    one = asked(tmp_path, trained_folder, batch=1, count=5, every=2)
    found = perform(one, folder=tmp_path / "stream")
    assert [point["edits"] for point in found.points] == [2, 4, 5]


@pytest.mark.parametrize(
    ("stop", "told"),
    [({"perplexity": 0.01}, "after 2 facts: perplexity is"), ({"retention": 1.01}, "of the facts")],
)
def test_a_stream_stops_where_it_is_told_to(
    tmp_path: Path, trained_folder: Path, stop: dict[str, float], told: str
) -> None:
    one = asked(tmp_path, trained_folder, count=8, stop=stop)
    found = perform(one, folder=tmp_path / "stream")
    assert told in found.record["stopped"]
    assert len(found.cases) == found.record["cases"] == found.points[-1]["edits"] < 8
    again = perform(one, folder=tmp_path / "stream")
    assert same(found, again)


def test_a_stream_that_stays_within_its_limits_goes_to_the_end(
    tmp_path: Path, trained_folder: Path
) -> None:
    one = asked(tmp_path, trained_folder, stop={"perplexity": 1e9, "retention": 1e-9})
    found = perform(one, folder=tmp_path / "stream")
    assert found.record["stopped"] == "" and len(found.cases) == 6


def test_a_stream_that_was_killed_gives_the_rows_of_one_that_was_not(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before and after every save, every write, and in the last scoring."""
    prefixes = {**asked(tmp_path, trained_folder).settings, "prefixes": [[1, 3]]}
    one = asked(tmp_path, trained_folder, count=4, settings=prefixes)
    whole = perform(one, folder=tmp_path / "whole")
    real_save = Edit.save

    def dying_at(fatal: int) -> None:
        count = iter(range(1000))

        def step() -> None:
            if next(count) == fatal:
                raise Killed

        def save(edit: Edit, *args: Any, **options: Any) -> None:
            step()
            real_save(edit, *args, **options)
            step()

        def write(*args: Any) -> Path:
            step()
            found = write_text(*args)
            step()
            return found

        def score(*args: Any, **options: Any) -> list[dict[str, Any]]:
            step()
            return scored(*args, **options)

        monkeypatch.setattr(Edit, "save", save)
        monkeypatch.setattr(module, "write_text", write)
        monkeypatch.setattr(module, "scored", score)

    deaths = 0
    for fatal in range(100):
        folder = tmp_path / f"killed-{fatal}"
        dying_at(fatal)
        try:
            perform(one, folder=folder)
        except Killed:
            deaths += 1
        else:
            break
        dying_at(-1)
        assert same(perform(one, folder=folder), whole), f"killed at step {fatal}"
    assert deaths == 2 * (2 + 2 + 2)


def test_killed_again_and_again_it_still_gets_there(
    tmp_path: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asked(tmp_path, trained_folder, method="rome", count=3, batch=1)
    whole = perform(one, folder=tmp_path / "whole")

    def write(path: Path, text: str) -> Path:
        write_text(path, text)
        raise Killed

    monkeypatch.setattr(module, "write_text", write)
    for done in range(3):
        assert len(list((tmp_path / "stream").glob("batch-*.json"))) == done
        with pytest.raises(Killed):
            perform(one, folder=tmp_path / "stream")
    assert same(perform(one, folder=tmp_path / "stream"), whole)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("grace", {"layers": [2], "updates": 10}),
        ("scen", {"layers": [2], "learning_rate": 0.2, "neuron_learning_rate": 0.3}),
    ],
)
def test_a_stream_of_edits_beside_the_weights_is_taken_up_too(
    tmp_path: Path,
    trained_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
) -> None:
    """Edits read from their files are merged as those that were just made."""
    one = asked(tmp_path, trained_folder, method=method, settings=settings, count=3, batch=1)
    whole = perform(one, folder=tmp_path / "whole")
    assert means(whole)["immediate.ES"] > 0.5

    def write(path: Path, text: str) -> Path:
        write_text(path, text)
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(module, "write_text", write)
        for _ in range(2):
            with pytest.raises(Killed):
                perform(one, folder=tmp_path / "stream")
    assert same(perform(one, folder=tmp_path / "stream"), whole)


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (lambda folder: (folder / "edit-00000.safetensors").unlink(), EditFileError, "cannot read"),
        (
            lambda folder: (folder / "edit-00001.safetensors").write_bytes(b"x" * 100),
            EditFileError,
            "cut short or altered",
        ),
        (
            lambda folder: (folder / "batch-00001.json").write_text("{"),
            StorageError,
            "batch-00001.json was altered.*Delete",
        ),
        (
            lambda folder: (folder / "batch-00001.json").write_text("{}"),
            StorageError,
            "was altered",
        ),
    ],
)
def test_checkpoints_that_were_spoilt_are_refused(
    tmp_path: Path, trained_folder: Path, spoil: Any, error: type[Exception], told: str
) -> None:
    one = asked(tmp_path, trained_folder)
    perform(one, folder=tmp_path / "stream")
    spoil(tmp_path / "stream")
    with pytest.raises(error, match=told):
        perform(one, folder=tmp_path / "stream")


def test_checkpoints_of_another_stream_are_refused(tmp_path: Path, trained_folder: Path) -> None:
    one = asked(tmp_path, trained_folder)
    perform(one, folder=tmp_path / "stream")
    with pytest.raises(StorageError, match="other cases"):
        perform(replace(one, seed=1), folder=tmp_path / "stream")
    shutil.rmtree(tmp_path / "stream")
    perform(replace(one, seed=1), folder=tmp_path / "stream")
