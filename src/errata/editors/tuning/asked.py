"""What fine-tuning asks of each request, and the loss of that: one rule for all variants.

- what the model should say: -log p(target | prompt), per token of the target;
- what it should say less (fact erasure): p(target | prompt), of the whole target, as in the code of
  Hase et al. 2023 (arXiv:2301.04213): its gradient vanishes once the answer is gone;
- what it should say where noise hides the subject (fact forcing): the first loss, averaged over the
  noise's samples, each of which is a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.lm.forward import logits_at
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits
from errata.lm.noise import NOISE, Hidden, hidden, subjects_hidden
from errata.lm.tokens import encode_answers, encode_requests, pad
from errata.requests import Request

Scored = Literal["answer", "last-position"]
"""Where the target's tokens are scored: each after those before it, or all after the prompt."""


@dataclass(frozen=True)
class Asked:
    """One row of the training: a request, and the draw of noise that hides its subject if any."""

    number: int
    """Of the request."""
    request: Request
    share: float
    """Of the request's loss; those of its rows add up to one."""
    veil: Hidden | None = None

    @property
    def example(self) -> Example:
        """What is asked, and the answer whose loss it is."""
        return Example(self.request.text, self.request.target)


def asked_of(lm: LanguageModel, requests: Sequence[Request], loss: Scored) -> list[Asked]:
    """A row for each request or, where noise hides its subject, for each of the noise's samples.

    Raises:
        ConfigError: a subject is to be hidden from a model that is not a decoder, or the loss at
            the prompt's last position is to be raised.
    """
    asked: list[Asked] = []
    for number, request in enumerate(requests):
        if request.problem.minimised and loss == "last-position":
            raise ConfigError(
                f"{request.variant} lowers the probability of the whole target; loss = "
                "'last-position' knows none. Take loss = 'answer'."
            )
        if not request.problem.hidden:
            asked.append(Asked(number, request, 1.0))
            continue
        lm.require_decoder(request.variant)
        rows = encode_requests(lm, [request])
        asked += [
            Asked(number, request, 1 / NOISE.samples, *hidden(lm, [request], rows, draw=draw))
            for draw in range(NOISE.samples)
        ]
    return asked


def asked_losses(lm: LanguageModel, asked: Sequence[Asked], loss: Scored) -> Tensor:
    """The loss (n,) of each row, in one pass and with gradient.

    Raises:
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
    """
    examples = [one.example for one in asked]
    with subjects_hidden(lm, [one.veil for one in asked]):
        if loss == "last-position":
            return last_position(lm, examples)
        answers = answer_logits(lm, examples)
    each = answers.losses()
    less = torch.tensor([one.request.problem.minimised for one in asked], device=each.device)
    return torch.where(less, answers.probabilities(), each) if less.any() else each


def last_position(lm: LanguageModel, examples: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood (n,) of each answer's tokens, all at the prompt's last position.

    Raises:
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        ConfigError: the model is not a decoder.
    """
    texts = encode_answers(lm, [e.prompt for e in examples], [e.answer for e in examples])
    batch = pad(lm, [text.ids[: text.prompt_length] for text in texts])
    ends = torch.tensor([text.prompt_length - 1 for text in texts])
    logits = logits_at(lm, batch, torch.arange(len(texts)), ends, ends.tolist())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    said = logits.log_softmax(dim=1)
    return torch.stack([-said[i, text.answer].mean() for i, text in enumerate(texts)])
