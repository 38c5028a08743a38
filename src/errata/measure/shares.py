"""How much of what was possible an edit reached: the scores of Hase et al. 2023 (arXiv:2301.04213).

Of an edit's target y, with p the probability p(y | x) of all of its tokens (a product, not a mean)
before the edit and p* after it:

    rewrite, paraphrase   (p* - p) / (1 - p),  or  (p - p*) / p  where y should be said less;
    neighbourhood         1 - |p* - p| / (|p - 1/2| + 1/2)
    overall               the harmonic mean of the three, case by case.

Each is from 0 to 1; x is the request, its first paraphrase, and a neighbour: another subject's
prompt, whose p should stay. Where the request's variant hides the subject, so does noise here, and
p is the mean over its samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, example_batches
from errata.lm.noise import NOISE, hidden, subjects_hidden
from errata.lm.tokens import encode_requests
from errata.measure.likelihood import judge, not_finite
from errata.requests import SLOT, Case, Request

_BATCH_TOKENS = 4096

Shares = Mapping[str, float]
"""`rewrite`, `paraphrases`, `neighbours` and `S`; what a case cannot measure is absent."""


def recovered(before: float, after: float) -> float:
    """The share of the possible that a probability gained: 0 for none, 1 for certainty."""
    return max(0.0, (after - before) / (1 - before)) if before < 1 else 0.0


def erased(before: float, after: float) -> float:
    """The share of a probability that is gone."""
    return max(0.0, (before - after) / before) if before > 0 else 0.0


def kept(before: float, after: float) -> float:
    """1 where a probability stayed, 0 where it moved as far as it could."""
    return 1 - abs(after - before) / (abs(before - 0.5) + 0.5)


@dataclass(frozen=True)
class Question:
    """A prompt after which a target is judged."""

    text: str
    target: str
    veiled: Request | None = None
    """The prompt as a request, where noise hides its subject."""


def asked(case: Case) -> dict[str, Question]:
    """The prompts after which a case's target is judged, the first of each group.

    A paraphrase that does not name the subject cannot be asked where noise hides it.
    """
    request = case.request
    found = {"rewrite": Question(request.text, request.target, _veiled(request, request.text))}
    if case.paraphrases:
        text = case.paraphrases[0]
        question = Question(text, request.target, _veiled(request, text))
        if question.veiled or not request.problem.hidden:
            found["paraphrases"] = question
    if case.neighbours:
        found["neighbours"] = Question(case.neighbours[0].prompt, request.target)
    return found


def _veiled(request: Request, text: str) -> Request | None:
    """A wording as a request whose subject noise hides; None if it hides none, or finds none."""
    before, subject, after = text.rpartition(request.subject)
    prompt = before + SLOT + after
    if not (request.problem.hidden and subject) or prompt.count(SLOT) != 1:
        return None
    return replace(request, prompt=prompt)


@torch.no_grad()
def probabilities(lm: LanguageModel, questions: Sequence[Question]) -> list[float]:
    """Each target's probability after its prompt: a product over its tokens.

    Where noise hides the subject, the mean over its samples.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
        TokenizationError: a prompt or target has no token of its own, or is too long.
    """
    clear = _in_clear(lm, list(dict.fromkeys(q for q in questions if q.veiled is None)))
    return [_behind_noise(lm, q.veiled) if q.veiled else clear[q] for q in questions]


def case_probabilities(lm: LanguageModel, cases: Sequence[Case]) -> list[dict[str, float]]:
    """Of each case, the probability of its target after each prompt of `asked`.

    Raises:
        NotFiniteError, TokenizationError: as for `probabilities`.
    """
    each = [asked(case) for case in cases]
    found = iter(probabilities(lm, [q for questions in each for q in questions.values()]))
    return [{name: next(found) for name in questions} for questions in each]


def shares(request: Request, before: Mapping[str, float], after: Mapping[str, float]) -> Shares:
    """The scores of one case.

    Args:
        request: says whether its target should be said more or less.
        before: the probability of each prompt of `asked`, of the unedited model.
        after: of the edited one.
    """
    reached = erased if request.problem.minimised else recovered
    found = {
        name: (kept if name == "neighbours" else reached)(before[name], after[name])
        for name in before
    }
    if len(found) == 3:
        each = found.values()
        found["S"] = 3 / sum(1 / x for x in each) if all(x > 0 for x in each) else 0.0
    return found


def _in_clear(lm: LanguageModel, questions: Sequence[Question]) -> dict[Question, float]:
    if lm.kind == "decoder":
        judged = judge(lm, [(q.text, q.target) for q in questions])
        return {q: math.exp(sum(judged[q.text, q.target].logprobs)) for q in questions}
    examples = [Example(q.text, q.target) for q in questions]
    found: dict[Question, float] = {}
    for group in example_batches(lm, examples, _BATCH_TOKENS):
        p = answer_logits(lm, [examples[i] for i in group]).probabilities()
        if not p.isfinite().all():
            raise not_finite(lm)
        found |= zip([questions[i] for i in group], p.tolist(), strict=True)
    return found


def _behind_noise(lm: LanguageModel, request: Request) -> float:
    rows = encode_requests(lm, [request])
    draws = range(NOISE.samples)
    veils = [veil for draw in draws for veil in hidden(lm, [request], rows, draw=draw)]
    with subjects_hidden(lm, veils):
        answers = answer_logits(lm, [Example(request.text, request.target)] * NOISE.samples)
    found = answers.probabilities().double()
    if not found.isfinite().all():
        raise not_finite(lm)
    return float(found.mean())
