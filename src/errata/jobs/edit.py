"""The main job: facts in, an edit out, judged before and after, saved, reported.

::

    lm = LanguageModel.load("pocket")
    change = edit(lm, read_requests("facts.jsonl"), method="memit")   # an Edit; lm is as it was
    result = run("pocket", read_cases("pocket", 100), out="edit.safetensors")   # all of it
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata.editors.fitted import load_editor
from errata.edits.edit import Edit
from errata.jobs.ask import ANSWER_TOKENS, answered, facts_of
from errata.jobs.cases import with_pocket_checks
from errata.jobs.files import check_writable
from errata.jobs.layers import NOTE, with_layers
from errata.jobs.methods import editor_for
from errata.jobs.models import Model, as_model, is_pocket
from errata.jobs.moments import Corpus, background_for
from errata.jobs.record import Fact, RunRecord, ScoreLine
from errata.jobs.report import save_report
from errata.jobs.score import AFTER, BEFORE, Judged, lines, observation
from errata.jobs.ship import changes_of
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.measure.drift import drift
from errata.measure.score import score
from errata.progress import Progress, silent
from errata.requests import Case, Request

METHOD = "memit"
"""What `errata edit` does unless told otherwise."""

SHOWN = 50
"""How many facts a report shows in full."""


def edit(
    model: Model,
    facts: Sequence[Request | Case],
    *,
    method: str = METHOD,
    settings: Mapping[str, Any] | None = None,
    corpus: Corpus = None,
    fitted: Path | str | None = None,
    progress: Progress = silent,
) -> Edit:
    """Compute the change that makes a model say the facts; the model stays as it is.

    Args:
        model: the model or its name.
        facts: requests, or cases whose requests are meant.
        method: a name in `EDITORS`.
        settings: the method's numbers that differ from the recipe's, such as
            `{"layers": [1, 2], "target.updates": 40}`; layers may be "auto:saliency" or
            "auto:tracing" (`jobs/layers.py`), which is then told in the edit's notes.
        corpus: ordinary text for the second moments: a file or folder, or texts.
        fitted: the file of an editor that was fitted to the model (`jobs/fit.py`), instead of
            method, settings and corpus.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the method or a setting is unknown.
        FitError: the method must be fitted first.
        RequestError: a request cannot be carried out, or two contradict each other.
        TargetError: the model could not be brought to say a target.
        WrongModelError: the editor was fitted to another model.
    """
    lm = as_model(model)
    requests = [fact.request if isinstance(fact, Case) else fact for fact in facts]
    if fitted is not None:
        return load_editor(fitted, lm).edit(lm, requests, progress=progress)
    background = background_for(lm, corpus)
    values, advice = with_layers(
        lm, requests, method, settings or {}, background, progress=progress
    )
    change = editor_for(lm, method, values, background).edit(lm, requests, progress=progress)
    return change if advice is None else change.with_notes({NOTE: advice})


@dataclass(frozen=True)
class EditRun:
    """What `run` made."""

    edit: Edit
    facts: tuple[Fact, ...]
    """What the model said and says; the facts that were carried out."""
    scores: tuple[ScoreLine, ...]
    """Before and after; empty where nothing was scored."""
    file: Path
    file_bytes: int
    report: Path | None
    advice: str
    """How the layers were chosen, where the facts chose them."""
    left_out: tuple[Request, ...]
    """Requests that failed, where the run was told to keep going."""
    seconds: Mapping[str, float] = field(default_factory=dict)


def run(
    model: Model,
    cases: Sequence[Case],
    *,
    method: str = METHOD,
    settings: Mapping[str, Any] | None = None,
    corpus: Corpus = None,
    fitted: Path | str | None = None,
    scored: bool = True,
    generation: bool = False,
    out: Path | str = "edit.safetensors",
    report: Path | str | None = None,
    title: str = "",
    progress: Progress = silent,
) -> EditRun:
    """Edit a model, judge it before and after, save the edit and write the report.

    Args:
        model: the model or its name; it is left as it was.
        cases: what it should say and how to check that. On a pocket model, bare requests about
            the pocket encyclopedia's facts get their prompts from there.
        method: a name in `EDITORS`.
        settings: the method's numbers that differ from the recipe's.
        corpus: ordinary text for the second moments.
        fitted: the file of a fitted editor, instead of method, settings and corpus.
        scored: measure all scores; otherwise only look at what the model says.
        generation: also score free text.
        out: the edit file.
        report: the HTML page; the JSON goes beside it. None writes neither.
        title: the report's heading.
        progress: called with (stage, done, total).

    Raises:
        StorageError: a result could not be written; found out before the work begins.
        ErrataError: whatever `edit` raises.
    """
    for path in (out, report):
        if path is not None:
            check_writable(path)
    clock = _Clock()
    with clock("loading"):
        progress("loading the model", 0, 1)
        lm = as_model(model)
        progress("loading the model", 1, 1)
    if is_pocket(lm):
        texts = [case.request.text for case in cases]
        today = complete(lm, texts, new_tokens=ANSWER_TOKENS)
        cases = with_pocket_checks(cases, dict(zip(texts, today, strict=True)))
    with clock("editing"):
        change = edit(
            lm,
            cases,
            method=method,
            settings=settings,
            corpus=corpus,
            fitted=fitted,
            progress=progress,
        )
    written = {(r.text, r.target) for r in change.requests}
    done = [c for c in cases if (c.request.text, c.request.target) in written]
    with clock("judging"):
        facts, judged = _judged(lm, change, done, scored, generation, progress)
    scores = lines(judged)
    if scores:
        change = change.with_scores({j.name: j.scores.summary() for j in judged})
    change.save(out)
    result = EditRun(
        edit=change,
        facts=tuple(facts),
        scores=scores,
        file=Path(out),
        file_bytes=Path(out).stat().st_size,
        report=Path(report) if report is not None else None,
        advice=change.record.notes.get(NOTE, {}).get("why", ""),
        left_out=tuple(c.request for c in cases if c not in done),
        seconds=clock.seconds,
    )
    if report is not None:
        save_report(record_of(lm, result, change.record.method, title), report)
    return result


def _judged(
    lm: LanguageModel,
    change: Edit,
    cases: Sequence[Case],
    scored: bool,
    generation: bool,
    progress: Progress,
) -> tuple[list[Fact], list[Judged]]:
    """What the model says and how it scores, before and with the edit."""
    facts = answered(
        lm, facts_of(cases[:SHOWN]), edited=False, stage="asking before", progress=progress
    )
    judged: list[Judged] = []
    if scored:
        before = score(lm, cases, generation=generation, progress=_during(BEFORE, progress))
        judged.append(Judged(BEFORE, before))
        seen = observation(lm, cases)
    with change.applied(lm):
        facts = answered(lm, facts, edited=True, stage="asking after", progress=progress)
        if scored:
            after = score(lm, cases, generation=generation, progress=_during(AFTER, progress))
            judged.append(Judged(AFTER, after, drift(lm, seen)))
    return facts, judged


def record_of(lm: LanguageModel, result: EditRun, method: str, title: str = "") -> RunRecord:
    """What the report tells about a run."""
    change = result.edit
    count = len(change.requests)
    notes = tuple(
        f"Left out, because its target was not reached: {r.text} [{r.target.strip()}]"
        for r in result.left_out
    )
    if result.advice:
        notes = (f"Layers: {result.advice}", *notes)
    return RunRecord(
        title=title or f"{count} fact{'s' if count != 1 else ''} corrected in {lm.name}",
        model=lm.name,
        models=(BEFORE, AFTER),
        method=method,
        config=change.record.config,
        facts=result.facts,
        fact_count=count,
        scores=result.scores,
        changes=changes_of(change, lm),
        edit_file=result.file.name,
        edit_bytes=result.file_bytes,
        seconds=result.seconds,
        notes=notes,
        seed=change.record.seed,
    )


def _during(name: str, progress: Progress) -> Progress:
    def told(stage: str, done: int, total: int) -> None:
        progress(f"{stage} ({name})", done, total)

    return told


class _Clock:
    """How long each part of a run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
