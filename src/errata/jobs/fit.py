"""Fitting an editor to a model, and judging it: `errata fit`.

::

    result = fit("pocket", read_cases("pocket"), method="mend", out="mend.safetensors")
    result.scores["EA"], result.scores["DD"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.editors.editor import Editor
from errata.editors.trainable import Fitted, Trainable, TrainingCases
from errata.errors import ConfigError, ErrataError, FitError
from errata.jobs.files import check_writable
from errata.jobs.layers import NOTE, with_layers
from errata.jobs.methods import editor_for, learns, methods
from errata.jobs.models import Model, as_model
from errata.jobs.moments import background_for
from errata.jobs.record import ScoreLine
from errata.jobs.stopwatch import Stopwatch
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.measure.editing import (
    GROUPS,
    Answered,
    answered,
    asked,
    drawdown,
    edit_accuracy,
    perplexity_drawdown,
    unedited,
)
from errata.measure.metrics import Estimate
from errata.progress import Progress, silent
from errata.requests import Case

MEANINGS = {
    "EA": "the wanted answer comes, in all wordings",
    "EA.rewrite": "... in the edit's own words",
    "EA.paraphrases": "... in other words",
    "DD": "accuracy lost on neighbours",
    "DD.perplexity": "perplexity of neighbours' answers gained",
}
"""What the scores of a fitted editor say; each edit alone, on the unedited model."""


@dataclass(frozen=True)
class FitRun:
    """What `fit` made."""

    editor: Fitted
    cases: TrainingCases
    scores: Mapping[str, Estimate]
    """On the validation cases: names of MEANINGS."""
    file: Path
    file_bytes: int
    checkpoints: Path
    seconds: Mapping[str, float]

    @property
    def lines(self) -> tuple[ScoreLine, ...]:
        """The scores, for people."""
        return tuple(
            ScoreLine(name, MEANINGS[name], (found,), percent=name != "DD.perplexity")
            for name, found in self.scores.items()
        )

    @property
    def training(self) -> Mapping[str, Any]:
        """How the training went: the fields of `Trained`."""
        told: Mapping[str, Any] = self.editor.fit.notes["training"]
        return told

    def curve(self, rows: int = 8) -> list[Mapping[str, float]]:
        """Some of the validations, spread evenly over the training, the best among them."""
        found = self.training["validations"]
        places = {round(i * (len(found) - 1) / max(1, rows - 1)) for i in range(rows)}
        return [v for i, v in enumerate(found) if i in places or v["step"] == self.training["best"]]


def fit(
    model: Model,
    cases: Sequence[Case],
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: Path | str,
    resume: bool = False,
    progress: Progress = silent,
) -> FitRun:
    """Fit a method's editor to a model, judge it on cases that it has not learnt from, save it.

    Args:
        model: the model or its name; it is left as it was.
        cases: nine in ten to learn from, the others to validate with.
        method: a name in `EDITORS`, of a method that is fitted.
        settings: the method's numbers that differ from the recipe's.
        seed: of the division of the cases and, unless the settings say otherwise, of the fit.
        out: the editor's file. Checkpoints are kept in the folder of that name with `.fit`.
        resume: go on with a fit that was cut short, or make more steps.
        progress: called with (stage, done, total).

    Raises:
        FitError: there is nothing to learn from, the loss became NaN, or a fit was cut short there
            and `resume` is not given.
        ConfigError: the method is not fitted, or a setting is unknown.
        StorageError: a file cannot be written; found out before the work begins.
    """
    out = Path(out)
    check_writable(out)
    checkpoints = out.with_suffix(".fit")
    if checkpoints.exists() and not resume:
        raise FitError(
            f"{checkpoints} holds the checkpoint of an earlier fit; go on with it (--resume), or "
            "delete it to begin anew."
        )
    clock = Stopwatch()
    with clock("loading"):
        lm = as_model(model)
    divided = TrainingCases.split(cases, seed=seed)
    values, advice = with_layers(
        lm,
        [case.request for case in divided.train],
        method,
        {"seed": seed, **(settings or {})},
        background_for(lm),
        progress=progress,
    )
    unfitted = editor_for(lm, method, values, background_for(lm))
    if not isinstance(unfitted, Trainable):
        raise ConfigError(
            f"{method} needs no fitting; edit with it straight away. Those that are fitted: "
            f"{', '.join(fitted_methods())}."
        )
    with clock("fitting"):
        editor = unfitted.fit(lm, divided, folder=checkpoints, progress=progress)
    with clock("judging"):
        scores = judged(lm, editor, divided.validation, progress=progress)
    told: dict[str, Any] = {"scores": {name: list(found) for name, found in scores.items()}}
    editor = editor.with_notes(told if advice is None else told | {NOTE: advice})
    editor.save(out)
    return FitRun(
        editor, divided, scores, out, out.stat().st_size, checkpoints, dict(clock.seconds)
    )


def fitted_methods() -> list[str]:
    """The methods that must be fitted before they edit."""
    return [name for name in methods() if learns(name)]


def judged(
    lm: LanguageModel, editor: Editor, cases: Sequence[Case], *, progress: Progress = silent
) -> dict[str, Estimate]:
    """Edit accuracy and drawdown of any editor: each case's edit alone, on the unedited model.

    A request that the editor fails on is asked of the unedited model.

    Args:
        lm: the model; it is left as it was.
        editor: the editor.
        cases: what to edit, in what other words to ask, and what must stay.
        progress: called with cases done.
    """
    questions = [asked(case) for case in cases]
    before = [one.forced for one in unedited(lm, cases, ())]
    after: dict[str, list[Answered]] = {name: [] for name in GROUPS}
    edits = editor.edit_each(lm, [[case.request] for case in cases], progress=progress)
    for groups, edit in zip(questions, edits, strict=True):
        if isinstance(edit, ErrataError):
            found = _answers(lm, groups)
        else:
            with edit.applied(lm):
                found = _answers(lm, groups)
        for name, answers in found.items():
            after[name].append(answers)
        progress("judging", len(after["rewrite"]), len(cases))
    scores = {
        "EA": edit_accuracy(list(map(_together, after["rewrite"], after["paraphrases"]))),
        "EA.rewrite": edit_accuracy(after["rewrite"]),
        "EA.paraphrases": edit_accuracy(after["paraphrases"]),
        "DD": drawdown(before, after["neighbours"]),
    }
    if lm.task == "generate":
        scores["DD.perplexity"] = perplexity_drawdown(before, after["neighbours"])
    return {name: found for name, found in scores.items() if found is not None}


def _answers(lm: LanguageModel, questions: Mapping[str, Sequence[Example]]) -> dict[str, Answered]:
    """The answers to each group of questions, asked at once."""
    found = answered(lm, [example for group in questions.values() for example in group])
    answers, start = {}, 0
    for name, group in questions.items():
        part = slice(start, start + len(group))
        answers[name] = Answered(found.right[part], found.nll[part], found.tokens[part])
        start += len(group)
    return answers


def _together(a: Answered, b: Answered) -> Answered:
    return Answered(a.right + b.right, a.nll + b.nll, a.tokens + b.tokens)
