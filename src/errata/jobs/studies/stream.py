"""Sequential streams: one batch after another on the edited model, watched as they go.

A folder holds a stream. After each batch it gets `edit-00012.safetensors` and then
`batch-00012.json`: what the batch scored right after its edit, and what was seen of everything so
far. Each file is there whole or not at all, and a batch counts once its JSON is there. Whoever is
killed goes on after the last such batch, with the edits from the files applied in order: bit
for bit the model that was there, so that the rows are those of a run that was never interrupted.

A point, what is seen of a stream after some batch, is

    {"edits": 48, "batches": 3, "metrics": {"ES": [mean, low, high, n], ...}, "norms": {path: ...}}

after 48 facts (those that failed count too). Its metrics are those of all cases so far, and also
`retention` (of the facts of earlier batches that took when written, the share that still holds),
`perplexity` (of neutral text), `perplexity ratio` (to that of the unedited model), `KL neighbours`
and `KL text` (divergence from the unedited model's next tokens). A norm is that of the whole change
to a weight, as a share of the weight's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from errata.editors.editor import Editor
from errata.edits.edit import Edit, as_json
from errata.edits.file import load_edit
from errata.edits.stack import Stack
from errata.errors import (
    ConfigError,
    ErrataError,
    NotFiniteError,
    RequestError,
    StorageError,
)
from errata.jobs.files import make_folder, write_text
from errata.jobs.score import observation
from errata.jobs.stopwatch import Stopwatch
from errata.jobs.studies.scoring import Before, CaseRow, mark_failed, scored, texts_wanted
from errata.jobs.studies.units import Unit
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.measure.drift import Drift, Observation, drift
from errata.measure.metrics import Estimate, interval
from errata.measure.score import Scores
from errata.progress import Progress, silent
from errata.requests import Case

IMMEDIATE = "immediate."
"""Begins the names of scores that were taken right after a case's own edit."""

TOOK = ("ES", "Reliability", "EA.rewrite")
"""What says whether a fact has taken, and still holds: the first of these that is measured."""


@dataclass
class Streamed:
    """A stream as far as it has come."""

    edits: list[Edit] = field(default_factory=list)
    """In order; none for a batch that failed as a whole."""
    immediate: list[CaseRow] = field(default_factory=list)
    """Scores of each case right after its own edit."""
    final: list[CaseRow] = field(default_factory=list)
    """Scores of all of these cases on the model as the stream left it."""
    points: list[Mapping[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    batches: int = 0
    stopped: str = ""
    """Why it ended early; empty if it did not."""

    def add(self, told: Mapping[str, Any], edit: Edit | None) -> None:
        """Take in what a batch's JSON tells."""
        self.batches += 1
        self.immediate += told["rows"]
        self.failures += told["failures"]
        self.stopped = told["stopped"]
        if told["point"]:
            self.points.append(told["point"])
        if edit is not None:
            self.edits.append(edit)


def stream(
    lm: LanguageModel,
    editor: Editor,
    cases: Sequence[Case],
    unit: Unit,
    answers: Before,
    folder: Path,
    clock: Stopwatch,
    progress: Progress = silent,
) -> Streamed:
    """Write all cases, batch after batch; go on where the folder's files end.

    Args:
        lm: the model, unedited; it is left so.
        editor: prepared on that model.
        cases: in the order in which they are written.
        unit: says how many are written at once, how often everything is scored, where to stop.
        answers: the unedited model's (`errata.jobs.studies.scoring.unedited_answers`).
        folder: the stream's own.
        clock: told the seconds of each stage.
        progress: called with (stage, done, total).

    Raises:
        StorageError: a checkpoint cannot be written, or is of another stream.
        EditFileError: a checkpoint's edit was altered.
    """
    make_folder(folder)
    batches = [cases[i : i + unit.batch] for i in range(0, len(cases), unit.batch)]
    with clock("scoring"):
        before = observation(lm, cases) if lm.kind == "decoder" else None
    found = resumed(folder, batches)
    last: list[CaseRow] = []
    with _as_it_was(lm):
        Stack(found.edits).apply_(lm)
        while found.batches < len(batches) and not found.stopped:
            number, batch = found.batches, batches[found.batches]
            with clock("editing"):
                edit, failures = _edited(editor, lm, batch)
                if edit is not None:
                    edit.save(folder / f"edit-{number:05}.safetensors")
            with clock("scoring"):
                edit, rows, refused = _applied(lm, edit, partial(scored, lm, batch, unit, answers))
                failures += refused
                mark_failed(rows, batch, edit.requests if edit else ())
                point: dict[str, Any] = {}
                if (number + 1) % unit.every == 0 or number + 1 == len(batches):
                    reached = cases[: len(found.immediate) + len(batch)]
                    last = scored(lm, reached, unit, answers)
                    point = _point(lm, before, found.immediate, last, number + 1)
            told = as_json(
                {
                    "rows": rows,
                    "edited": edit is not None,
                    "failures": failures,
                    "point": point,
                    "stopped": _why_to_stop(point, unit.stop),
                }
            )
            write_text(folder / f"batch-{number:05}.json", json.dumps(told))
            found.add(told, edit)
            progress("batches", found.batches, len(batches))
        texts = texts_wanted(unit, len(found.immediate))
        with clock("scoring"):
            if texts or not last:
                reached = cases[: len(found.immediate)]
                last = scored(lm, reached, unit, answers, texts=texts, progress=progress)
    for first, row in zip(found.immediate, last, strict=True):
        row["failed"] = first["failed"]
        row["metrics"] |= {IMMEDIATE + name: value for name, value in first["metrics"].items()}
    found.final = last
    return found


def resumed(folder: Path, batches: Sequence[Sequence[Case]]) -> Streamed:
    """What the folder's files tell of a stream that was begun.

    Raises:
        StorageError: they are of another stream, or were altered.
        EditFileError: an edit is missing or was altered.
    """
    found = Streamed()
    for number, batch in enumerate(batches):
        file = folder / f"batch-{number:05}.json"
        if not file.exists():
            break
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            same = [row["case_id"] for row in told["rows"]] == [case.case_id for case in batch]
            edit = load_edit(folder / f"edit-{number:05}.safetensors") if told["edited"] else None
            found.add(told, edit)
        except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"the checkpoint {file} was altered ({error!r}). Delete {folder} to begin the "
                "stream anew."
            ) from error
        if not same:
            raise StorageError(
                f"{file} is of a stream of other cases. Delete {folder} to begin anew."
            )
    return found


def _applied(
    lm: LanguageModel, edit: Edit | None, score: Callable[[], list[CaseRow]]
) -> tuple[Edit | None, list[CaseRow], list[str]]:
    """Put a batch's edit on the model and score the batch.

    An edit that breaks the model is as if it had never been made; then the reason is told too.
    """
    if edit is None:
        return None, score(), []
    try:
        edit.apply_(lm)
        return edit, score(), []
    except NotFiniteError as error:
        if edit.is_applied(lm):
            edit.undo_(lm)
        return None, score(), [str(error)]


@contextmanager
def _as_it_was(lm: LanguageModel) -> Iterator[None]:
    """Take back, at the end, whatever was applied inside."""
    below = len(lm.applied)
    try:
        yield
    finally:
        Stack(lm.applied[below:]).undo_(lm)


def _edited(
    editor: Editor, lm: LanguageModel, batch: Sequence[Case]
) -> tuple[Edit | None, list[str]]:
    """The batch's edit of the model as it is now, and what failed."""
    try:
        edit = editor.edit(lm, [case.request for case in batch])
    except (ConfigError, RequestError):
        raise
    except ErrataError as error:
        return None, [str(error)]
    return edit, list(edit.record.notes.get("left out", ()))


def _point(
    lm: LanguageModel,
    before: Observation | None,
    earlier: Sequence[CaseRow],
    now: Sequence[CaseRow],
    batches: int,
) -> dict[str, Any]:
    """What is seen of the stream after so many batches.

    Args:
        lm: the model as it is now.
        before: what it predicted when it was unedited; None for a model that does not go on from
            a text, of which no drift is told.
        earlier: scores of the cases of earlier batches, right after their own edit.
        now: scores of all cases so far.
        batches: how many were carried out.
    """
    metrics: dict[str, Estimate] = Scores(tuple(now)).summary()
    name = next((name for name in TOOK if name in metrics), "")
    took = [
        row["metrics"][name]
        for first, row in zip(earlier, now, strict=False)  # `now` has those of the last batch too
        if first["metrics"].get(name) == 1.0
    ]
    if took:
        metrics["retention"] = interval(took, within=(0.0, 1.0))
    if before is not None:
        metrics |= _moved(drift(lm, before))
    return {
        "edits": len(now),
        "batches": batches,
        "metrics": metrics,
        "norms": {path: _share(lm, path) for path in lm.originals},
    }


def _moved(found: Drift) -> dict[str, Estimate]:
    """Drift by the names of a point."""
    told = {name: one for name, one in found.summary().items() if name.startswith("KL")}
    if found.perplexity_before and found.perplexity_after:
        told["perplexity"] = after = found.perplexity_after
        start = found.perplexity_before.mean
        mean, low, high = (value / start for value in after[:3])
        told["perplexity ratio"] = Estimate(mean, low, high, after.n)
    return told


def _share(lm: LanguageModel, path: str) -> float:
    """The norm of the change to a weight over the weight's own."""
    original = lm.originals[path].double()
    change = weight_out_in(lm.module(path)).double() - original
    return float(change.norm() / original.norm())


def _why_to_stop(point: Mapping[str, Any], stop: Mapping[str, float]) -> str:
    """Which threshold is passed; empty if none is."""
    metrics: Mapping[str, Estimate] = point.get("metrics", {})
    after = f"after {point.get('edits')} facts"
    ratio, held = metrics.get("perplexity ratio"), metrics.get("retention")
    if ratio and ratio.mean > stop.get("perplexity", float("inf")):
        return f"{after}: perplexity is {ratio.mean:.3g} times the unedited model's"
    if held and held.mean < stop.get("retention", 0.0):
        return f"{after}: only {held.mean:.1%} of the facts that took still hold"
    return ""
