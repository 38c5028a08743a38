"""One unit of a study: draw the cases, edit as its protocol says, score, undo.

- *single*: each case alone, each edit on the unedited model;
- *batch*: so many cases at once, each batch on the unedited model;
- *sequential*: batch after batch on the edited model (`errata.jobs.studies.stream`).

A request that fails is not left out of the scores: it is scored on the model as it is without it,
and counted under `failed`. Within a batch the others are written all the same. An edit with which
the model gives no numbers any more has failed too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from errata.editors import Background
from errata.editors.editor import Editor
from errata.editors.trainable import Trainable
from errata.edits.edit import Edit, as_json
from errata.errors import ErrataError, RequestError
from errata.jobs.cases import sample_cases
from errata.jobs.cluster import held
from errata.jobs.layers import with_layers
from errata.jobs.methods import editor_for
from errata.jobs.moments import background_for
from errata.jobs.stopwatch import Stopwatch
from errata.jobs.studies import host
from errata.jobs.studies.fits import fitted, told, training_cases
from errata.jobs.studies.scoring import (
    Before,
    CaseRow,
    consistent,
    mark_failed,
    scored,
    small,
    texts_wanted,
    unedited_answers,
)
from errata.jobs.studies.stream import IMMEDIATE, stream
from errata.jobs.studies.units import UNEDITED, Unit, config_of
from errata.jobs.variants import posed
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.measure.metrics import Estimate
from errata.measure.score import Scores
from errata.progress import Progress, silent
from errata.requests import Case, Request

TOLD = 20
"""Failures that a record tells in full."""

REMEMBERED = 8
"""Sets of targets that are kept for the next unit on the same model."""


Size = tuple[int, int]
"""Of an edit: how many numbers the weights have that it changes, and its own bytes."""


@dataclass(frozen=True)
class Outcome:
    """What a unit gave: the fields of its row."""

    metrics: Mapping[str, Estimate]
    cases: tuple[Mapping[str, Any], ...]
    """One for each: case_id, relation, metrics, and whether its request failed."""
    points: tuple[Mapping[str, Any], ...] = ()
    """A stream's scores on its way."""
    record: Mapping[str, Any] = field(default_factory=dict)


def perform(
    unit: Unit, *, folder: Path | str, fit: Path | str | None = None, progress: Progress = silent
) -> Outcome:
    """Do the work of a unit. The model of this process is left as it was.

    Args:
        unit: what to do.
        folder: where a stream keeps its checkpoints; a stream that was cut short goes on there.
        fit: the file of the unit's fitted editor, for a method that must learn first; it is fitted
            now if there is no such file. By default it is in the folder.
        progress: called with (stage, done, total).

    Raises:
        ErrataError: the model, the cases or the settings do not allow it.
    """
    clock = Stopwatch()
    file = Path(fit or Path(folder) / "fit.safetensors")
    with clock("loading"):
        lm = held(unit.model, unit.dtype, unit.device)
        cases, left_out = _asked(lm, unit)
        if unit.batch > len(cases):
            raise RequestError(
                f"a batch of {unit.batch} cannot be made of {len(cases)} cases; lower "
                "`protocol.batch`."
            )
    host.forget_peak_memory()
    with clock("scoring"):
        before = unedited_answers(lm, cases, unit)
    record: dict[str, Any] = {"seeds": {"cases": unit.seed}}
    if unit.variant is not None:
        record["not posed"] = left_out[:TOLD]
    metrics: dict[str, Estimate] = {}
    points: Sequence[Mapping[str, Any]] = ()
    if unit.method == UNEDITED:
        with clock("scoring"):
            texts = texts_wanted(unit, len(cases))
            rows = scored(lm, cases, unit, before, texts=texts, progress=progress)
    else:
        editor, made = _prepared(lm, cases, unit, file, clock, progress)
        record["seeds"]["editor"] = editor.config.seed
        record |= made
        if unit.protocol == "sequential":
            done = stream(lm, editor, cases, unit, before, Path(folder), clock, progress)
            rows, points, failures = done.final, done.points, done.failures
            sizes = [_size(lm, edit) for edit in done.edits]
            metrics = {IMMEDIATE + n: e for n, e in _summary(done.immediate, unit).items()}
            record["stopped"] = done.stopped
        else:
            rows, failures, sizes = _apart(lm, editor, cases, unit, before, clock, progress)
        record["failures"] = failures[:TOLD]
        if sizes:
            parameters, nbytes = (sum(sums) / len(sizes) for sums in zip(*sizes, strict=True))
            record["edits"] = {"made": len(sizes), "parameters": parameters, "bytes": nbytes}
    consistent(rows, cases)
    record |= {
        "cases": len(rows),
        "failed": sum(row["failed"] for row in rows),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "seconds": clock.seconds,
        **host.about(str(lm.device)),
    }
    metrics = _summary(rows, unit) | metrics
    return Outcome(metrics, tuple(map(small, rows)), tuple(points), as_json(record))


def _asked(lm: LanguageModel, unit: Unit) -> tuple[list[Case], list[str]]:
    """The unit's cases, and why others of its sample cannot be posed as its variant.

    Raises:
        RequestError: none of them can.
    """
    cases = sample_cases(unit.data, unit.count, unit.seed)
    if unit.variant is None:
        return cases, []
    found, skipped = posed(lm, cases, unit.variant)
    why = [one.why for one in skipped]
    if not found:
        raise RequestError(
            f"none of {len(cases)} cases can be posed to {lm.name} as {unit.variant}: {why[0]}"
        )
    return found, why


def _prepared(
    lm: LanguageModel,
    cases: Sequence[Case],
    unit: Unit,
    file: Path,
    clock: Stopwatch,
    progress: Progress,
) -> tuple[Editor, dict[str, Any]]:
    """The unit's editor, ready to edit these cases, and what the record tells of how it was made.

    One that must learn first is fitted, or waited for while another process does that.
    """
    made: dict[str, Any] = {}
    with clock("preparing"):
        learnt = cases if unit.fit is None else training_cases(unit).train
        editor, why = editor_of(unit, lm, [case.request for case in learnt])
    if why:
        made["layers"] = why
    if isinstance(editor, Trainable):
        with clock("fitting"):
            editor = fitted(lm, editor, unit, file, progress)
        made["fit"] = told(lm, editor, file)
        host.forget_peak_memory()
    with clock("preparing"):
        editor.prepare(lm, progress=progress)
    made["config"] = editor.config.to_dict() | {"layers": editor.layers(lm)}
    return editor, made


def _summary(rows: Sequence[CaseRow], unit: Unit) -> dict[str, Estimate]:
    return Scores(tuple(rows)).summary(seed=unit.seed)


def editor_of(unit: Unit, lm: LanguageModel, facts: Sequence[Request]) -> tuple[Editor, str]:
    """The unit's editor, and why it edits the layers that it does, where facts choose them.

    What methods share on a model, moments and targets, is kept with it. The unit's seed is the
    editor's too, and in a batch the other requests go on where one fails, unless the settings say
    otherwise.

    Args:
        unit: says which editor.
        lm: the model, unedited.
        facts: choose the layers where the settings say so.
    """
    backgrounds = _backgrounds.setdefault(lm, {})
    text = unit.corpus, unit.corpus_tokens
    if text not in backgrounds:
        backgrounds[text] = background_for(lm, *text, remember=REMEMBERED)
    known = {f.name for f in fields(config_of(unit))}
    usual = {"seed": unit.seed, "keep_going": True}
    settings = {name: value for name, value in usual.items() if name in known}
    settings, advice = with_layers(
        lm, facts, unit.method, settings | dict(unit.settings), backgrounds[text]
    )
    editor = editor_for(lm, unit.method, settings, backgrounds[text])
    return editor, advice.why if advice else ""


_backgrounds: WeakKeyDictionary[LanguageModel, dict[tuple[str | None, int | None], Background]] = (
    WeakKeyDictionary()
)


def _apart(
    lm: LanguageModel,
    editor: Editor,
    cases: Sequence[Case],
    unit: Unit,
    before: Before,
    clock: Stopwatch,
    progress: Progress,
) -> tuple[list[CaseRow], list[str], list[Size]]:
    """Each batch on the unedited model: rows of scores, what failed, and the edits' sizes."""
    batches = [cases[i : i + unit.batch] for i in range(0, len(cases), unit.batch)]
    requests = [[case.request for case in batch] for batch in batches]
    edits = editor.edit_each(lm, requests, progress=progress)
    texts = texts_wanted(unit, len(cases))
    rows: list[CaseRow] = []
    failures: list[str] = []
    sizes: list[Size] = []
    for batch in batches:
        with clock("editing"):
            edit = next(edits)
        with clock("scoring"):
            score = partial(scored, lm, batch, unit, before, texts=texts - len(rows))
            try:
                if isinstance(edit, ErrataError):
                    raise edit
                with edit.applied(lm):
                    found = score()
                mark_failed(found, batch, edit.requests)
                sizes.append(_size(lm, edit))
                failures += edit.record.notes.get("left out", ())
            except ErrataError as error:
                failures.append(str(error))
                found = score()
                mark_failed(found, batch, ())
        rows += found
        progress("cases", len(rows), len(cases))
    return rows, failures, sizes


def _size(lm: LanguageModel, edit: Edit) -> Size:
    return sum(weight_out_in(lm.module(path)).numel() for path in edit.paths), edit.nbytes
