"""Edit accuracy and drawdown: what the papers of learnt editors report.

Edit accuracy (EA, SaLEM's equation 7) is the share of prompts whose most likely answer is the one
that the edit wants: E[1{argmax p(y | x_e) = y_e}], all of the answer's tokens under teacher
forcing, or the label. Drawdown (DD) is what an edit costs elsewhere: the accuracy lost on answers
that must stay or, for models that write, also the perplexity of those answers gained (Mitchell et
al. 2022; SaLEM, appendix B.2). Every value is averaged within a case first, then over cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from errata.errors import NotFiniteError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, example_batches
from errata.measure.metrics import Estimate, interval


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


@torch.no_grad()
def answered(
    lm: LanguageModel, examples: Sequence[Example], *, batch_tokens: int = 4096
) -> Answered:
    """Ask a model, of any kind, as it is now.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        RequestError: a classifier has no such label.
    """
    found: list[tuple[bool, float, int]] = [(False, 0.0, 0)] * len(examples)
    for group in example_batches(lm, examples, batch_tokens):
        answers = answer_logits(lm, [examples[i] for i in group])
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
    right, nll, tokens = zip(*found, strict=True) if found else ((), (), ())
    return Answered(right, nll, tokens)


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
