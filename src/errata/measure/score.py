"""Scores of a model on cases, under three protocols that are never mixed.

- *probability*: is the wanted answer likelier than its rival? CounterFact's ES, PS, NS and their
  magnitudes EM, PM, NM.
- *teacher-forced*: are the answer's tokens the top predictions, each after the true tokens before
  it? Counted per token (zsRE's accuracy) and per whole answer.
- *free*: does the model's own greedy continuation begin with the answer? What a user reads.

A metric's name says its protocol: the paper's abbreviations and `.success`, `.magnitude` compare
probabilities; `.token` and `.answer` are teacher-forced; `.free` is read. What a case cannot
measure (it has no neighbours, say) is absent from its row, never zero.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from errata.errors import ConfigError, DatasetError, RequestError, StorageError
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode
from errata.measure import metrics
from errata.measure.editing import EDITING_COLUMNS
from errata.measure.likelihood import Answer, Pair, judge
from errata.measure.metrics import Estimate
from errata.progress import Progress, silent
from errata.requests import Case, read_jsonl

Protocol = Literal["probability", "teacher-forced", "free"]
PROTOCOLS: tuple[Protocol, ...] = ("probability", "teacher-forced", "free")

_BATCH_ROWS = 64
"""Texts written at the same time."""

PAPER = {
    "rewrite.success": "ES",
    "rewrite.magnitude": "EM",
    "paraphrases.success": "PS",
    "paraphrases.magnitude": "PM",
    "neighbours.success": "NS",
    "neighbours.magnitude": "NM",
}
"""Names that the papers gave."""

HARMONIC = {"S": ("ES", "PS", "NS")} | {
    f"S.{kind}": (f"rewrite.{kind}", f"paraphrases.{kind}", f"neighbours.{kind}")
    for kind in ("token", "answer", "free")
}
"""Harmonic means over the cases' means; S.token is zsRE's."""

COLUMNS = (
    ("S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS")
    + tuple(
        f"{group}.{kind}"
        for kind in ("success", "magnitude", "token", "answer", "free")
        for group in ("S", "rewrite", "paraphrases", "neighbours", "attributes", "same_subject")
    )
    + EDITING_COLUMNS
)
"""Metrics in the order of the papers' tables, then the others; not all of these exist."""


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that is wanted there and, where there is one, its rival."""

    prompt: str
    answer: str
    rival: str | None


def questions(case: Case) -> dict[str, list[Question]]:
    """What a case asks, by group; the rival is what must not win there."""
    new, true = case.request.target, case.request.true
    about: dict[str, list[tuple[str, str, str | None]]] = {
        "rewrite": [(case.request.text, new, true)],
        "paraphrases": [(prompt, new, true) for prompt in case.paraphrases],
        "neighbours": [(probe.prompt, probe.answer, new) for probe in case.neighbours],
        "attributes": [(probe.prompt, probe.answer, true) for probe in case.attributes],
        "same_subject": [(probe.prompt, probe.answer, new) for probe in case.same_subject],
    }
    return {
        group: [
            Question(prompt, answer, None if rival and rival.strip() == answer.strip() else rival)
            for prompt, answer, rival in asked
        ]
        for group, asked in about.items()
        if asked
    }


@dataclass(frozen=True)
class Scores:
    """One row for each case: what was asked, raw numbers, texts, and `row["metrics"]`."""

    rows: tuple[dict[str, Any], ...]

    def summary(self, *, seed: int = 0) -> dict[str, Estimate]:
        """Each metric's mean over the cases that have it, with its interval, in COLUMNS' order.

        `seed` is of the harmonic means' bootstrap.
        """
        present = {name for row in self.rows for name in row["metrics"]}
        known = {name: self.column(name) for name in COLUMNS if name in present}
        summary = {}
        for name in COLUMNS:
            if name in known:
                values = [x for x in known[name] if not math.isnan(x)]
                summary[name] = metrics.interval(values, within=_range(name))
            elif name in HARMONIC and all(part in known for part in HARMONIC[name]):
                parts = list(zip(*(known[part] for part in HARMONIC[name]), strict=True))
                summary[name] = metrics.harmonic_interval(parts, seed=seed)
        return summary

    def column(self, name: str) -> list[float]:
        """One metric of every case; NaN where a case does not have it."""
        return [row["metrics"].get(name, math.nan) for row in self.rows]

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows (metric, mean, interval, cases) to print, times 100 as the papers do."""
        return [
            (name, f"{100 * e.mean:.1f}", _span(100 * e.low, 100 * e.high), str(e.n))
            for name, e in self.summary().items()
        ]

    def to_jsonl(self, path: Path | str) -> None:
        """Write a row a line, aside first, so that the file is whole or not there.

        Raises:
            StorageError: the file cannot be written.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "w", encoding="utf-8") as file:
                file.writelines(lines)
            os.replace(aside, path)
        except OSError as error:
            raise StorageError(f"cannot write the scores to {path}: {error}") from error
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    @classmethod
    def from_jsonl(cls, path: Path | str) -> Self:
        """Read what `to_jsonl` wrote.

        Raises:
            RequestFileError: the file cannot be read, or a line is not a JSON object.
            DatasetError: a line is not a row of scores.
        """
        rows = read_jsonl(path)
        for number, row in rows:
            if not isinstance(row.get("metrics"), dict):
                raise DatasetError(f"{path}, line {number}: not a row of scores (no 'metrics').")
        return cls(tuple(row for _, row in rows))


def score(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    protocols: Iterable[Protocol] = PROTOCOLS,
    generation: bool = False,
    seed: int = 0,
    batch_tokens: int = 2048,
    progress: Progress = silent,
) -> Scores:
    """Score a model, edited or not, on all prompts of all cases at once.

    Args:
        lm: the model as it is now.
        cases: what to ask.
        protocols: which to measure.
        generation: also let the model write on from each generation prompt (up to 100 tokens in
            all, top-k 5), for GE and RS.
        seed: of that sampling.
        batch_tokens: at most so many tokens in one forward pass.
        progress: called with (stage, done, total).

    Raises:
        RequestError: there is no case.
        ConfigError: a protocol is unknown.
        NotFiniteError: the model gives NaN or infinity.
        TokenizationError: a prompt or answer has no token, or is too long for the model.
    """
    wanted = set(protocols)
    if not cases:
        raise RequestError("there is no case to score.")
    if unknown := wanted - set(PROTOCOLS):
        raise ConfigError(f"unknown protocols {sorted(unknown)}; known are {list(PROTOCOLS)}.")
    asked = [questions(case) for case in cases]
    flat = [question for groups in asked for group in groups.values() for question in group]
    judged: dict[Pair, Answer] = {}
    if wanted - {"free"}:
        pairs = [(q.prompt, q.answer) for q in flat]
        if "probability" in wanted:
            pairs += [(q.prompt, q.rival) for q in flat if q.rival is not None]
        judged = judge(lm, pairs, batch_tokens=batch_tokens, progress=progress)
    said = _said(lm, flat, progress) if "free" in wanted else {}
    written = _written(lm, cases, seed, progress) if generation else [[]] * len(cases)
    references = list(dict.fromkeys(text for case in cases for text in case.references))
    consistency = metrics.Consistency(references) if generation and references else None
    rows = []
    for case, groups, texts in zip(cases, asked, written, strict=True):
        found = {
            group: [_found(question, judged, said, wanted) for question in group_questions]
            for group, group_questions in groups.items()
        }
        measured = _measured(found)
        if texts:
            measured["GE"] = metrics.fluency(texts)
        if texts and case.references and consistency:
            measured["RS"] = consistency(texts, case.references)
        about = {"case_id": case.case_id, "relation": case.relation, **case.request.to_dict()}
        rows.append(
            about | {"model": lm.name, "seed": seed, "metrics": measured, "texts": texts} | found
        )
    return Scores(tuple(rows))


def _found(
    question: Question,
    judged: Mapping[Pair, Answer],
    said: Mapping[str, str],
    protocols: Collection[Protocol],
) -> dict[str, Any]:
    """What the model makes of one question, as JSON; a protocol not asked for leaves no trace."""
    found: dict[str, Any] = {"prompt": question.prompt, "answer": question.answer}
    if "probability" in protocols:
        found["nll"] = judged[question.prompt, question.answer].nll
    if "probability" in protocols and question.rival is not None:
        found["rival"] = question.rival
        found["rival_nll"] = judged[question.prompt, question.rival].nll
    if "teacher-forced" in protocols:
        found["hits"] = list(judged[question.prompt, question.answer].hits)
    if "free" in protocols:
        found["says"] = said[question.prompt]
    return found


def _measured(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Every metric of one case, each an average over the prompts of its group."""
    measured = {}
    for group, answers in found.items():
        pairs = [(a["nll"], a["rival_nll"]) for a in answers if "rival_nll" in a]
        hits = [a["hits"] for a in answers if "hits" in a]
        read = [metrics.reads(a["says"], a["answer"]) for a in answers if "says" in a]
        if pairs:
            measured[f"{group}.success"] = metrics.success(*zip(*pairs, strict=True))
            measured[f"{group}.magnitude"] = metrics.magnitude(*zip(*pairs, strict=True))
        if hits:
            measured[f"{group}.token"] = metrics.token_accuracy(hits)
            measured[f"{group}.answer"] = metrics.answer_accuracy(hits)
        if read:
            measured[f"{group}.free"] = sum(read) / len(read)
    return {PAPER.get(name, name): value for name, value in measured.items()}


def _said(lm: LanguageModel, asked: Iterable[Question], progress: Progress) -> dict[str, str]:
    """What a user reads after each prompt: the greedy continuation, a little past the answer."""
    answers: dict[str, list[str]] = {}
    for question in asked:
        answers.setdefault(question.prompt, []).append(question.answer)
    longest = [max(map(len, encode(lm, texts))) + 2 for texts in answers.values()]
    rooms = [max(8, 1 << (length - 1).bit_length()) for length in longest]  # few distinct numbers
    texts = _continued(lm, list(answers), rooms, "answers", progress)
    return dict(zip(answers, texts, strict=True))


def _written(
    lm: LanguageModel, cases: Sequence[Case], seed: int, progress: Progress
) -> list[list[str]]:
    """The texts that GE and RS judge, prompt included, normalised as the reference code does."""
    prompts = [prompt for case in cases for prompt in case.generation]
    options = {"seed": seed, "top_k": 5, "total_tokens": True}
    texts = _continued(lm, prompts, [100] * len(prompts), "texts", progress, **options)
    tidy = (
        unicodedata.normalize("NFKD", prompt + text).replace("\n\n", " ")
        for prompt, text in zip(prompts, texts, strict=True)
    )
    return [[next(tidy) for _ in case.generation] for case in cases]


def _continued(
    lm: LanguageModel,
    prompts: Sequence[str],
    rooms: Sequence[int],
    stage: str,
    progress: Progress,
    *,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Continue prompts by so many tokens each; those of one room share batches."""
    texts = [""] * len(prompts)
    stripped = [prompt.rstrip() for prompt in prompts]
    alike: dict[int, list[int]] = {}
    lengths = [len(ids) for ids in encode(lm, stripped)]
    for index in sorted(range(len(prompts)), key=lengths.__getitem__):
        alike.setdefault(rooms[index], []).append(index)
    done = 0
    for room, members in alike.items():
        for start in range(0, len(members), _BATCH_ROWS):
            group = members[start : start + _BATCH_ROWS]
            told = complete(
                lm,
                [stripped[i] for i in group],
                new_tokens=room,
                seed=seed + done,  # not the same draws for each batch
                batch_rows=_BATCH_ROWS,
                **options,
            )
            for index, text in zip(group, told, strict=True):
                texts[index] = text
            done += len(group)
            progress(stage, done, len(prompts))
    return texts


def _range(name: str) -> tuple[float, float]:
    """Which values a metric can take."""
    if name == "GE":
        return 0.0, math.inf
    if name.endswith("perplexity"):
        return (-math.inf if name.startswith("DD") else 0.0), math.inf
    negative = name in ("EM", "PM", "NM", "DD") or name.endswith(".magnitude")
    return (-1.0 if negative else 0.0), 1.0


def _span(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{low:.1f} to {high:.1f}"
