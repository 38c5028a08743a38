"""A method on trial: edit, score, undo, for one case after another or one batch after another.

Every edit starts from the unedited model, so that n cases are n independent measurements (or n / b
of them, of b facts at once). A request that the method fails on is scored on the unedited model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.editors.editor import Editor
from errata.editors.fitted import load_editor
from errata.errors import ErrataError, RequestError
from errata.jobs.files import check_writable
from errata.jobs.layers import with_layers
from errata.jobs.methods import editor_for
from errata.jobs.models import Model, as_model
from errata.jobs.moments import Corpus, background_for
from errata.jobs.record import ScoreLine
from errata.jobs.score import AFTER, BEFORE, Judged, lines
from errata.measure.score import Protocol, Scores, score
from errata.progress import Progress, silent
from errata.requests import Case

logger = logging.getLogger(__name__)

PROTOCOLS: tuple[Protocol, ...] = ("probability", "teacher-forced")


@dataclass(frozen=True)
class Trial:
    """What a method did to the cases."""

    method: str
    names: tuple[str, ...]
    scores: tuple[ScoreLine, ...]
    cases: int
    batch: int
    failed: tuple[str, ...]
    """What went wrong, for each edit that could not be made."""
    advice: str = ""
    """How the layers were chosen, where the facts chose them."""


def trial(
    model: Model,
    cases: Sequence[Case],
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    corpus: Corpus = None,
    fitted: Path | str | None = None,
    batch: int = 1,
    out: Path | str | None = None,
    progress: Progress = silent,
) -> Trial:
    """Measure a method: edits of `batch` cases each, every one on the unedited model.

    Args:
        model: the model or its name; it is left as it was.
        cases: what to write and how to check it.
        method: a name in `EDITORS`.
        settings: the method's numbers that differ from the recipe's; layers may be
            "auto:saliency" or "auto:tracing" and are then chosen once, from all cases.
        corpus: ordinary text for the second moments.
        fitted: the file of a fitted editor, instead of method, settings and corpus.
        batch: how many facts are written at once.
        out: write a JSON line for each case, after its edit, here.
        progress: called with (stage, done, total).

    Raises:
        RequestError: there is no case, or two of one batch contradict each other.
        ConfigError: the method or a setting is unknown.
        StorageError: `out` cannot be written.
    """
    if not cases:
        raise RequestError("there is no case to try the method on.")
    if out is not None:
        check_writable(out)
    lm = as_model(model)
    editor: Editor
    advice = None
    if fitted is not None:
        editor = load_editor(fitted, lm)
    else:
        asked = [case.request for case in cases]
        background = background_for(lm, corpus)
        values, advice = with_layers(
            lm, asked, method, settings or {}, background, progress=progress
        )
        editor = editor_for(lm, method, values, background)
    before = score(lm, cases, protocols=PROTOCOLS, progress=progress)
    batches = [cases[i : i + batch] for i in range(0, len(cases), batch)]
    requests = [[case.request for case in part] for part in batches]
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    edits = editor.edit_each(lm, requests, progress=progress)
    for part, edit in zip(batches, edits, strict=True):
        if isinstance(edit, ErrataError):
            failed.append(str(edit))
            rows += score(lm, part, protocols=PROTOCOLS).rows
        else:
            with edit.applied(lm):
                rows += score(lm, part, protocols=PROTOCOLS).rows
        progress("edits", len(rows), len(cases))
    after = Scores(tuple(rows))
    if out is not None:
        after.to_jsonl(out)
    judged = [Judged(BEFORE, before), Judged(AFTER, after)]
    told = advice.why if advice else ""
    return Trial(
        editor.name, (BEFORE, AFTER), lines(judged), len(cases), batch, tuple(failed), told
    )
