"""Judging models: unedited, with an edit, with several, with a stack of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.edits.edit import Edit
from errata.edits.file import load_edit
from errata.edits.stack import Stack
from errata.errors import RequestError
from errata.jobs.cases import read_cases, with_pocket_checks
from errata.jobs.files import check_writable
from errata.jobs.models import Model, as_model, is_pocket
from errata.jobs.record import RunRecord, ScoreLine
from errata.jobs.report import save_report
from errata.jobs.ship import changes_of, model_for
from errata.lm.load import LanguageModel
from errata.measure.drift import Drift, Observation, drift, observe
from errata.measure.metrics import Estimate
from errata.measure.score import Scores, score
from errata.pocket.encyclopedia import Encyclopedia
from errata.progress import Progress, silent
from errata.requests import Case, Request

BEFORE, AFTER = "before", "after"
"""What the two columns of a table are called where one edit is judged."""

NEUTRAL = 64
"""How many sentences of ordinary prose drift is measured on."""

_GROUPS = {
    "rewrite": "the prompt itself",
    "paraphrases": "paraphrases",
    "neighbours": "neighbours, which must keep their own answer",
    "attributes": "subjects that truly have the new object",
    "same_subject": "other facts of the same subject, which must stay",
}
_KINDS = {
    "success": "the wanted answer is likelier than its rival",
    "magnitude": "by how much its probability is higher",
    "token": "share of the answer's tokens that are the top prediction",
    "answer": "every token of the answer is the top prediction",
    "free": "what the model writes by itself begins with the answer",
    "share": "how much of what was possible came about",
}
_NAMED = {
    "S": ("S", "harmonic mean of ES, PS and NS"),
    "ES": ("Efficacy (ES)", f"{_GROUPS['rewrite']}: the new answer is likelier than the old one"),
    "EM": ("Efficacy (EM)", f"{_GROUPS['rewrite']}: {_KINDS['magnitude']}"),
    "PS": ("Generalisation (PS)", "paraphrases: the new answer is likelier than the old one"),
    "PM": ("Generalisation (PM)", f"paraphrases: {_KINDS['magnitude']}"),
    "NS": ("Specificity (NS)", "neighbours: their own answer stays likelier than the new one"),
    "NM": ("Specificity (NM)", f"neighbours: {_KINDS['magnitude']}"),
    "GE": ("Fluency (GE)", "entropy of word pairs and triples in free text; repetition scores low"),
    "RS": ("Consistency (RS)", "likeness of free text to texts about what has the new object"),
    "KL neighbours": ("Drift on neighbours", "KL divergence of the next token, in nats"),
    "KL text": ("Drift on neutral text", "KL divergence of each next token, in nats"),
    "perplexity": ("Perplexity", "of neutral text"),
    "EA": ("Edit accuracy (EA)", "the wanted answer is the likeliest, in all wordings"),
    "EA.rewrite": ("Edit accuracy (rewrite)", "... in the edit's own words"),
    "EA.paraphrases": ("Edit accuracy (paraphrases)", "... in other words"),
    "DD": ("Drawdown (DD)", "accuracy lost on answers that must stay"),
    "DD.perplexity": ("Drawdown (perplexity)", "perplexity gained of answers that must stay"),
    "Reliability": ("Reliability", "what is written to the edit's prompt begins with the answer"),
    "Generality": ("Generality", "what is written to its other wordings begins with the answer"),
    "Locality": ("Locality", "what was answered rightly before is still written so"),
    "Average": ("Average", "mean of reliability, generality and locality"),
    "Reliability.forced": ("Reliability (forced)", "every token is likeliest after the true ones"),
    "Generality.forced": ("Generality (forced)", "the same in other wordings"),
    "Locality.forced": ("Locality (forced)", "the same of what was answered rightly before"),
}
_NOT_SHARES = ("GE", "KL neighbours", "KL text")
"""Beside perplexities."""


@dataclass(frozen=True)
class Judged:
    """One model's scores."""

    name: str
    scores: Scores
    drift: Drift | None = None
    """Against the unedited model; None for that model itself."""


def judge(
    model: Model,
    cases: Sequence[Case],
    edits: Mapping[str, Edit],
    *,
    generation: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Judged]:
    """Score the model as it is, then with each of the edits, one at a time.

    Args:
        model: the model or its name; it is left as it was.
        cases: what to ask.
        edits: what to judge, by the name that tables give it.
        generation: also let the model write freely, for fluency and consistency.
        seed: of the free writing.
        progress: called with (stage, done, total).

    Raises:
        WrongModelError: an edit was made for another model.
        RequestError: there is no case.
    """
    lm = as_model(model)
    before = score(lm, cases, generation=generation, seed=seed, progress=_named(BEFORE, progress))
    judged = [Judged(BEFORE, before)]
    if not edits:
        return judged
    seen = observation(lm, cases)
    for name, edit in edits.items():
        with edit.applied(lm):
            after = score(
                lm, cases, generation=generation, seed=seed, progress=_named(name, progress)
            )
            judged.append(Judged(name, after, drift(lm, seen)))
    return judged


def observation(lm: LanguageModel, cases: Sequence[Case]) -> Observation:
    """What the unedited model predicts on the neighbours and on neutral prose."""
    neighbours = [probe.prompt for case in cases for probe in case.neighbours]
    return observe(lm, neighbours, Encyclopedia.load().sentences[:NEUTRAL])


def _named(name: str, progress: Progress) -> Progress:
    def told(stage: str, done: int, total: int) -> None:
        progress(f"{stage} ({name})", done, total)

    return told


def lines(judged: Sequence[Judged]) -> tuple[ScoreLine, ...]:
    """All scores side by side, in the order of the papers' tables."""
    columns = [_estimates(one) for one in judged]
    seen = next((one.drift.perplexity_before for one in judged if one.drift), None)
    if seen is not None:
        columns[0]["perplexity"] = seen
    return _lines(columns)


def recorded_lines(
    scores: Mapping[str, Mapping[str, Sequence[float | None]]],
) -> tuple[ScoreLine, ...]:
    """The same from an edit's record: model -> metric -> [mean, low, high, cases]."""
    return _lines(
        [{name: _from_json(values) for name, values in row.items()} for row in scores.values()]
    )


def _from_json(values: Sequence[float | None]) -> Estimate:
    mean, low, high, count = (math.nan if value is None else value for value in values)
    return Estimate(mean, low, high, int(count))


def _lines(columns: Sequence[Mapping[str, Estimate]]) -> tuple[ScoreLine, ...]:
    names = dict.fromkeys(name for column in columns for name in column)
    return tuple(
        ScoreLine(
            *meaning(name),
            estimates=tuple(column.get(name) for column in columns),
            percent=name not in _NOT_SHARES and not name.endswith("perplexity"),
        )
        for name in names
    )


def meaning(metric: str) -> tuple[str, str]:
    """A metric's title and what it says, for readers who do not know the papers' names."""
    if metric in _NAMED:
        return _NAMED[metric]
    group, _, kind = metric.partition(".")
    if group == "S":
        parts = "the prompt, paraphrases and neighbours"
        return f"S ({kind})", f"harmonic mean over {parts}: {_KINDS.get(kind, kind)}"
    title = group.replace("_", " ").capitalize()
    return f"{title} ({kind})", f"{_GROUPS.get(group, group)}: {_KINDS.get(kind, kind)}"


def _estimates(one: Judged) -> dict[str, Estimate]:
    found = one.scores.summary()
    if one.drift is not None:
        found |= one.drift.summary()
        found.pop("perplexity before", None)
        if (after := found.pop("perplexity after", None)) is not None:
            found["perplexity"] = after
    return found


@dataclass(frozen=True)
class ScoreRun:
    """What `run` measured."""

    names: tuple[str, ...]
    """The models, first the unedited one."""
    scores: tuple[ScoreLine, ...]
    cases: int
    note: str = ""
    """What a reader must know about the choice of cases; empty if nothing."""


def run(
    model: Model | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    files: Sequence[Path | str] = (),
    stack: bool = False,
    data: Path | str | None = None,
    count: int | None = None,
    every_case: bool = False,
    generation: bool = False,
    seed: int = 0,
    out: Path | str | None = None,
    report: Path | str | None = None,
    progress: Progress = silent,
) -> ScoreRun:
    """Score a model, and edit files on it.

    Args:
        model: the model or its name; by default the one that the edits name, or `pocket`.
        dtype: to load it in.
        device: to load it on.
        files: edit files, each judged on its own.
        stack: judge all files applied in order, instead of each on its own.
        data: where the cases are from; the edits' own facts if there are edits, else `pocket`.
        count: at most so many cases.
        every_case: also the cases that none of the edits is about.
        generation: also let the model write freely.
        seed: of the free writing.
        out: write a JSON line for each case of each model here.
        report: write the HTML page here, and its JSON beside it.
        progress: called with (stage, done, total).

    Raises:
        EditFileError: a file is no edit.
        WrongModelError: an edit was made for another model.
        StorageError: a result cannot be written.
    """
    for path in (out, report):
        if path is not None:
            check_writable(path)
    edits = _loaded(files, stack)
    requests = [request for edit in edits.values() for request in edit.requests]
    named = model or (model_for(next(iter(edits.values())), None) if edits else "pocket")
    cases, note = _chosen(named, data, count, requests, every_case)
    lm = as_model(named, dtype=dtype, device=device)
    judged = judge(lm, cases, edits, generation=generation, seed=seed, progress=progress)
    if out is not None:
        _rows(judged).to_jsonl(out)
    result = ScoreRun(tuple(one.name for one in judged), lines(judged), len(cases), note)
    if report is not None:
        save_report(_record(lm, result, edits, seed), report)
    return result


def _loaded(files: Sequence[Path | str], stack: bool) -> dict[str, Edit]:
    """Edits by a name of their own: the file's, with its folder where two files share it."""
    paths = [Path(file) for file in files]
    names = [path.name for path in paths]
    edits = {
        path.name if names.count(path.name) == 1 else str(path): load_edit(path) for path in paths
    }
    return {"stack": Stack(tuple(edits.values()))} if stack and edits else edits


def _record(lm: LanguageModel, result: ScoreRun, edits: Mapping[str, Edit], seed: int) -> RunRecord:
    only = next(iter(edits.values())) if len(edits) == 1 else None
    return RunRecord(
        title=f"Scores of {lm.name} on {result.cases} cases",
        model=lm.name,
        models=result.names,
        method=only.record.method if only else "",
        config=only.record.config if only else {},
        fact_count=result.cases,
        scores=result.scores,
        changes=changes_of(only, lm) if only else (),
        notes=(result.note,) if result.note else (),
        seed=seed,
    )


def _chosen(
    model: Model,
    data: Path | str | None,
    count: int | None,
    requests: Sequence[Request],
    every_case: bool,
) -> tuple[list[Case], str]:
    if data is None and requests:
        cases = [Case(request) for request in dict.fromkeys(requests)]
        return (with_pocket_checks(cases) if is_pocket(model) else cases)[:count], ""
    cases = read_cases(data or "pocket", None if requests and not every_case else count)
    if not cases:
        raise RequestError(f"there is no case in {data}.")
    if not requests or every_case:
        return cases, ""
    wanted = {(request.text, request.target.strip()) for request in requests}
    about = [c for c in cases if (c.request.text, c.request.target.strip()) in wanted]
    if about:
        return about[:count], ""
    return cases[:count], "None of these cases is about a fact that was edited."


def _rows(judged: Sequence[Judged]) -> Scores:
    return Scores(tuple({"edit": one.name} | row for one in judged for row in one.scores.rows))
