"""Edit accuracy and drawdown: what the papers of learnt editors report.

Edit accuracy (EA, SaLEM's equation 7) is the share of prompts whose most likely answer is the one
that the edit wants: E[1{argmax p(y | x_e) = y_e}], all of the answer's tokens under teacher
forcing, or the label. Drawdown (DD) is what an edit costs elsewhere: the accuracy lost on answers
that must stay or, for models that write, also the perplexity of those answers gained (Mitchell et
al. 2022; SaLEM, appendix B.2). Every value is averaged within a case first, then over cases.

Reliability, Generality and Locality (SCEN, appendix A) are read from what the model writes by
itself: to the edit's prompt, to its other wordings, and to the questions that must stay, of those
that the unedited model answered rightly. An answer counts that begins with the wanted one as whole
words, since not every model stops there; an encoder, which writes nothing, chooses. `.forced` is
the same under teacher forcing, every token of the answer.

Perplexities (SCEN's second task) are those of the wanted answers, whole sentences as a rule: of the
edit's own, and of those that must stay as likely as they were. Of each case's own, averaged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from errata.errors import ConfigError, NotFiniteError
from errata.lm.load import LanguageModel
from errata.lm.loss import (
    Beginning,
    Example,
    answer_logits,
    beginnings,
    example_batches,
    predictions,
)
from errata.lm.tokens import encode
from errata.measure.metrics import Estimate, interval, reads, reads_already
from errata.measure.shares import case_probabilities, shares
from errata.requests import Case

Comparison = Literal["editing", "answers", "shares", "perplexity"]
COMPARISONS: tuple[Comparison, ...] = ("editing", "answers", "shares", "perplexity")
"""What is read beside the unedited model: EA and DD; Reliability and its like; the shares of the
possible (`errata.measure.shares`). And perplexities of whole answers, which stand alone."""

EDITING_COLUMNS = (
    "EA",
    "EA.rewrite",
    "EA.paraphrases",
    "DD",
    "DD.perplexity",
    "Reliability",
    "Generality",
    "Locality",
    "Average",
    "Reliability.forced",
    "Generality.forced",
    "Locality.forced",
    "S.share",
    "rewrite.share",
    "paraphrases.share",
    "neighbours.share",
    "rewrite.perplexity",
    "paraphrases.perplexity",
    "neighbours.perplexity",
)
"""Their metrics, in the order of tables."""

_BATCH_TOKENS = 4096

GROUPS = ("rewrite", "paraphrases", "neighbours")


@dataclass(frozen=True)
class Answered:
    """How a model answers some examples, each token after the true ones before it."""

    right: tuple[bool, ...]
    """Whether the wanted answer is the most likely one, every token of it."""
    nll: tuple[float, ...]
    """Mean negative log-likelihood of the wanted answer's tokens, in nats."""
    tokens: tuple[int, ...]
    """How many tokens it has; 1 for a label."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def perplexity(self) -> float:
        """Of all the answers' tokens."""
        return float(np.exp(np.dot(self.nll, self.tokens) / sum(self.tokens)))


def answered(
    lm: LanguageModel, examples: Sequence[Example], *, batch_tokens: int = _BATCH_TOKENS
) -> Answered:
    """Ask a model, of any kind, as it is now.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        RequestError: a classifier has no such label.
    """
    return _read(lm, examples, batch_tokens, begun=False)[0]


@torch.no_grad()
def _read(
    lm: LanguageModel, examples: Sequence[Example], batch_tokens: int, *, begun: bool
) -> tuple[Answered, list[Beginning]]:
    """`answered`, and how what the model writes by itself begins, where that is asked for."""
    found: list[tuple[bool, float, int]] = [(False, 0.0, 0)] * len(examples)
    beginning = [Beginning("", ended=False)] * len(examples)
    for group in example_batches(lm, examples, batch_tokens):
        some = [examples[i] for i in group]
        answers = answer_logits(lm, some, following=begun)
        losses = answers.losses()
        if not losses.isfinite().all():
            raise NotFiniteError(
                f"{lm.name} gives probabilities that are not finite: its weights, or an edit on "
                "them, hold NaN or infinity, or its dtype overflows (try float32 or bfloat16)."
            )
        counts = torch.bincount(answers.rows)
        told = zip(answers.right().tolist(), losses.tolist(), counts.tolist(), strict=True)
        for index, one in zip(group, told, strict=True):
            found[index] = one
        if begun:
            for index, begins in zip(group, beginnings(lm, some, answers), strict=True):
                beginning[index] = begins
    right, nll, tokens = zip(*found, strict=True) if found else ((), (), ())
    return Answered(right, nll, tokens), beginning


def edit_accuracy(cases: Sequence[Answered]) -> Estimate | None:
    """EA over cases, each with the answers to its own prompts; None where no case has any."""
    values = [case.accuracy for case in cases if case.right]
    return interval(values, within=(0.0, 1.0)) if values else None


def drawdown(before: Sequence[Answered], after: Sequence[Answered]) -> Estimate | None:
    """DD: accuracy lost, case by case, on the answers that must stay; None where there are none.

    Args:
        before: of the unedited model, to each case's own questions.
        after: of the model with the case's edit, to the same.
    """
    lost = [
        old.accuracy - new.accuracy for old, new in zip(before, after, strict=True) if old.right
    ]
    return interval(lost, within=(-1.0, 1.0)) if lost else None


def perplexity_drawdown(
    before: Sequence[Answered], after: Sequence[Answered], *, seed: int = 0, resamples: int = 1000
) -> Estimate | None:
    """DD of models that write: perplexity of all answers that must stay, after less before.

    Perplexity is that of all tokens together, so its interval is a percentile bootstrap over cases.

    Args:
        before: of the unedited model, to each case's own questions.
        after: of the model with the case's edit, to the same.
        seed: of the resampling.
        resamples: how many times n cases are drawn with replacement.
    """
    rows = np.array(
        [
            (np.dot(old.nll, old.tokens), np.dot(new.nll, new.tokens), sum(old.tokens))
            for old, new in zip(before, after, strict=True)
            if old.right
        ]
    )
    if not len(rows):
        return None

    def gained(
        sums: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """(..., 3) -> (...), after less before."""
        return np.asarray(np.exp(sums[..., 1] / sums[..., 2]) - np.exp(sums[..., 0] / sums[..., 2]))

    draws = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
    low, high = np.quantile(gained(rows[draws].sum(axis=1)), (0.025, 0.975))
    mean = float(gained(rows.sum(axis=0)))
    if len(rows) == 1:
        return Estimate(mean, float("nan"), float("nan"), 1)
    return Estimate(mean, float(low), float(high), len(rows))


def asked(case: Case) -> dict[str, list[Example]]:
    """What a case asks and wants to hear, by GROUPS."""
    wanted = case.request.target
    return {
        "rewrite": [Example(case.request.text, wanted)],
        "paraphrases": [Example(prompt, wanted) for prompt in case.paraphrases],
        "neighbours": [Example(probe.prompt, probe.answer) for probe in case.neighbours],
    }


@dataclass(frozen=True)
class Unedited:
    """How the unedited model answers the questions of one case that must stay."""

    forced: Answered
    said: tuple[bool, ...] = ()
    """Whether it gives the answer by itself; empty where nobody asked."""
    target: Mapping[str, float] = field(default_factory=dict)
    """The probability of the edit's target after each prompt; empty where nobody asked."""


def unedited(
    lm: LanguageModel, cases: Sequence[Case], comparisons: Collection[Comparison]
) -> list[Unedited]:
    """Ask the unedited model, all cases at once; what `compared` wants to know.

    Raises:
        ConfigError: perplexities are asked of a model that does not write.
    """
    if "perplexity" in comparisons and lm.task != "generate":
        raise ConfigError(
            f"{lm.name} writes nothing, so its answers have no perplexity; leave `perplexity` out "
            "of `metrics`."
        )
    questions = [asked(case)["neighbours"] for case in cases]
    targets = _targets(lm, cases, comparisons)
    asked_all = _asked_all(lm, questions, "answers" in comparisons)
    return [Unedited(*each) for each in zip(*asked_all, targets, strict=True)]


def compared(
    lm: LanguageModel,
    cases: Sequence[Case],
    before: Sequence[Unedited],
    comparisons: Collection[Comparison],
) -> list[dict[str, float]]:
    """Metrics of each case on the model as it is now, all cases asked at once.

    What a case cannot measure is absent. Perplexity gained is here that of each case's own answers.

    Args:
        lm: the model.
        cases: what to ask.
        before: of the unedited model, for each case.
        comparisons: which to measure.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
    """
    groups = [examples for case in cases for examples in asked(case).values()]
    forced, said = _asked_all(lm, groups, "answers" in comparisons)
    targets = _targets(lm, cases, comparisons)
    found: list[dict[str, float]] = []
    for number, old in enumerate(before):
        first = len(GROUPS) * number
        rewrite, others, kept = forced[first : first + len(GROUPS)]
        measured: dict[str, float] = {}
        if "editing" in comparisons:
            perplexity = lm.task == "generate"
            measured |= _editing(rewrite, others, kept, old.forced, perplexity=perplexity)
        if "answers" in comparisons:
            measured |= _answers(said[first], said[first + 1], said[first + 2], old.said)
            right = _answers(rewrite.right, others.right, kept.right, old.forced.right)
            right.pop("Average", None)
            measured |= {f"{name}.forced": value for name, value in right.items()}
        if "perplexity" in comparisons:
            told = zip(GROUPS, (rewrite, others, kept), strict=True)
            measured |= {f"{name}.perplexity": one.perplexity for name, one in told if one.right}
        reached = shares(cases[number].request, old.target, targets[number])
        measured |= {f"{name}.share": value for name, value in reached.items()}
        found.append({name: measured[name] for name in EDITING_COLUMNS if name in measured})
    return found


def _targets(
    lm: LanguageModel, cases: Sequence[Case], comparisons: Collection[Comparison]
) -> list[dict[str, float]]:
    return case_probabilities(lm, cases) if "shares" in comparisons else [{} for _ in cases]


def _editing(
    rewrite: Answered, others: Answered, kept: Answered, before: Answered, *, perplexity: bool
) -> dict[str, float]:
    """EA and DD of one case."""
    right = rewrite.right + others.right
    found = {"EA": sum(right) / len(right), "EA.rewrite": rewrite.accuracy}
    if others.right:
        found["EA.paraphrases"] = others.accuracy
    if kept.right:
        found["DD"] = before.accuracy - kept.accuracy
    if kept.right and perplexity:
        found["DD.perplexity"] = kept.perplexity - before.perplexity
    return found


def _answers(
    rewrite: Sequence[bool], others: Sequence[bool], kept: Sequence[bool], before: Sequence[bool]
) -> dict[str, float]:
    """Shares of right answers of one case."""
    held = [now for now, then in zip(kept, before, strict=True) if then]
    groups = {"Reliability": rewrite, "Generality": others, "Locality": held}
    found = {name: sum(right) / len(right) for name, right in groups.items() if right}
    if len(found) == len(groups):
        found["Average"] = sum(found.values()) / len(groups)
    return found


def _asked_all(
    lm: LanguageModel, groups: Sequence[Sequence[Example]], also_said: bool
) -> tuple[list[Answered], list[tuple[bool, ...]]]:
    """Ask groups of questions at once: what comes under teacher forcing, and by itself."""
    flat = [example for group in groups for example in group]
    writes = also_said and lm.kind != "encoder"
    forced, begun = _read(lm, flat, _BATCH_TOKENS, begun=writes)
    said: Sequence[bool] = ()
    if also_said:  # an encoder, which writes nothing, chooses
        said = _said(lm, flat, begun) if writes else forced.right
    ends = np.cumsum([len(group) for group in groups]).tolist()
    parts = [slice(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    return (
        [Answered(forced.right[p], forced.nll[p], forced.tokens[p]) for p in parts],
        [tuple(said[p]) for p in parts],
    )


def _said(
    lm: LanguageModel, examples: Sequence[Example], begun: Sequence[Beginning]
) -> tuple[bool, ...]:
    """Whether the model gives each answer by itself.

    How it begins tells nearly always; only what that leaves open is written, each prompt once.
    """
    said = [
        reads_already(one.text, example.answer, ended=one.ended)
        for one, example in zip(begun, examples, strict=True)
    ]
    texts = _written(lm, [e for e, known in zip(examples, said, strict=True) if known is None])
    return tuple(
        reads(texts[example.prompt.rstrip()], example.answer) if known is None else known
        for example, known in zip(examples, said, strict=True)
    )


def _written(lm: LanguageModel, examples: Sequence[Example]) -> dict[str, str]:
    """What the model writes after each prompt, a little further than the longest of its answers."""
    answers: dict[str, list[str]] = {}
    for example in examples:
        answers.setdefault(example.prompt.rstrip(), []).append(example.answer)
    rooms: dict[int, list[str]] = {}
    for prompt, wanted in answers.items():
        longest = max(map(len, encode(lm, wanted))) + 2
        rooms.setdefault(max(8, 1 << (longest - 1).bit_length()), []).append(prompt)
    texts: dict[str, str] = {}
    for room, prompts in rooms.items():
        texts |= zip(prompts, predictions(lm, prompts, new_tokens=room), strict=True)
    return texts
