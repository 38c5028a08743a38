"""A method on trial: edit, score, undo, for one case after another or one batch after another.

Every edit starts from the unedited model, so that n cases are n independent measurements (or n / b
of them, of b facts at once). A request that the method fails on is scored on the unedited model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.editors.closed_form.closed_form import ClosedForm
from errata.edits.edit import Edit
from errata.errors import RequestError, TargetError
from errata.jobs.methods import editor_for
from errata.jobs.models import Model, as_model
from errata.jobs.moments import Corpus, background_for
from errata.jobs.record import ScoreLine
from errata.jobs.score import AFTER, BEFORE, Judged, lines
from errata.jobs.files import check_writable
from errata.lm.load import LanguageModel
from errata.measure.score import Protocol, Scores, score
from errata.progress import Progress, silent
from errata.requests import Case

logger = logging.getLogger(__name__)

PROTOCOLS: tuple[Protocol, ...] = ("probability", "teacher-forced")


@dataclass(frozen=True)
class Trial:
    """What a method did to the cases."""

    names: tuple[str, ...]
    scores: tuple[ScoreLine, ...]
    cases: int
    batch: int
    failed: tuple[str, ...]
    """What went wrong, for each edit that could not be made."""


def trial(
    model: Model,
    cases: Sequence[Case],
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    corpus: Corpus = None,
    batch: int = 1,
    out: Path | str | None = None,
    progress: Progress = silent,
) -> Trial:
    """Measure a method: edits of `batch` cases each, every one on the unedited model.

    Args:
        model: the model or its name; it is left as it was.
        cases: what to write and how to check it.
        method: a name in `EDITORS`.
        settings: the method's numbers that differ from the recipe's.
        corpus: ordinary text for the second moments.
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
    editor = editor_for(lm, method, settings, background_for(lm, corpus))
    before = score(lm, cases, protocols=PROTOCOLS, progress=progress)
    batches = [cases[i : i + batch] for i in range(0, len(cases), batch)]
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for part, edit in zip(batches, _edits(editor, lm, batches, progress), strict=True):
        if isinstance(edit, TargetError):
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
    return Trial((BEFORE, AFTER), lines(judged), len(cases), batch, tuple(failed))


def _edits(
    editor: ClosedForm, lm: LanguageModel, batches: Sequence[Sequence[Case]], progress: Progress
) -> Iterator[Edit | TargetError]:
    """An edit for each batch, or why there is none."""
    requests = [[case.request for case in part] for part in batches]
    if all(len(part) == 1 for part in requests):
        yield from editor.edit_each(lm, [part[0] for part in requests], progress=progress)
        return
    for part in requests:
        try:
            yield editor.edit(lm, part)
        except TargetError as error:
            yield error
