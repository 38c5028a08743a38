"""Noise that hides a subject: what causal tracing corrupts a prompt with, and fact forcing edits.

Numbers are drawn from a seed and scaled by how far the embeddings' own entries spread, so that
whoever edits a request and whoever judges it see the same noise without telling each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from errata.errors import ConfigError, RequestError
from errata.lm.hooks import rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.tokens import Encoded, encode_requests
from errata.requests import Request


@dataclass(frozen=True)
class Noise:
    """What hides the subject.

    Raises:
        ConfigError: a number or name makes no sense.
    """

    scale: float = 3.0
    """Its size, in `unit`s; published scripts: 0.1 for GPT-2 XL and 0.025 for GPT-J, absolute."""
    unit: Literal["std", "absolute"] = "std"
    """Standard deviations of the embeddings' entries, or the embeddings' own unit."""
    distribution: Literal["gaussian", "uniform"] = "gaussian"
    """Normal with this standard deviation, or uniform between plus and minus this size."""
    samples: int = 10
    """How many corrupted runs are averaged."""
    seed: int = 1
    """Of the numbers drawn, which are the same for each place restored."""
    replace: bool = False
    """Put noise in the place of embeddings rather than add it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        for name, known in (
            ("unit", ("std", "absolute")),
            ("distribution", ("gaussian", "uniform")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"the noise's {name} is {' or '.join(map(repr, known))}, not "
                    f"{getattr(self, name)!r}."
                )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"the noise's scale must be a positive number, got {self.scale}.")
        if self.samples < 1:
            raise ConfigError(f"noise needs at least one sample, got {self.samples}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"the noise's seed must be from 0 to 2^32 - 1, got {self.seed}.")

    def draw(self, tokens: int, width: int) -> NDArray[np.float64]:
        """(samples, tokens, width) numbers of size 1, as the reference code draws them."""
        random, shape = np.random.RandomState(self.seed), (self.samples, tokens, width)
        if self.distribution == "gaussian":
            return random.randn(*shape)
        return random.uniform(-1, 1, shape)


NOISE = Noise()
"""What hides the subject of a request whose variant says so: tracing's usual noise."""


@dataclass(frozen=True)
class Hidden:
    """One draw of noise on the subject of one row of tokens; a plain value, drawn where needed."""

    first: int
    last: int
    """The subject's tokens."""
    level: float
    """The noise's size in the embeddings' own unit."""
    draw: int
    """Which of the noise's samples; beyond the last they begin anew."""
    noise: Noise

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        request: Request,
        row: Encoded,
        *,
        draw: int = 0,
        noise: Noise = NOISE,
    ) -> Self:
        """What hides a request's subject in its row, in the spread of that subject's embeddings."""
        level = noise_level(lm, [request.subject], noise)
        return cls(row.subject_first, row.subject_last, level, draw, noise)

    def values(self, width: int) -> Tensor:
        """(tokens, width) what is put on the embeddings, float64."""
        drawn = self.noise.draw(self.last + 1 - self.first, width)
        return torch.from_numpy(self.level * drawn[self.draw % self.noise.samples])


def hidden(
    lm: LanguageModel, requests: Sequence[Request], rows: Sequence[Encoded], *, draw: int = 0
) -> list[Hidden | None]:
    """What hides the subject of each request in its row; None where its variant hides nothing.

    Raises:
        ConfigError: a subject is to be hidden from a model that is not a decoder.
    """
    found: list[Hidden | None] = []
    for request, row in zip(requests, rows, strict=True):
        if request.problem.hidden:
            lm.require_decoder(request.variant)
        found.append(Hidden.of(lm, request, row, draw=draw) if request.problem.hidden else None)
    return found


@contextmanager
def subjects_hidden(lm: LanguageModel, rows: Sequence[Hidden | None]) -> Iterator[None]:
    """While open, passes over these rows of tokens, in their order, see noise on their subjects.

    Each row must begin at its first token. Where none is hidden nothing is done.

    Raises:
        HookError: no pass was made.
    """
    if not any(rows):
        yield
        return

    def noisy(embedded: Tensor) -> Tensor:
        """(n, t, width) with noise."""
        embedded = embedded.clone()
        for number, one in enumerate(rows):
            if one is not None:
                place = slice(one.first, one.last + 1)
                values = one.values(embedded.shape[2]).to(embedded)
                kept = 0.0 if one.noise.replace else embedded[number, place]
                embedded[number, place] = kept + values
        return embedded

    with rewritten_output(lm.embedding, noisy):
        yield


def noise_level(
    lm: LanguageModel, subjects: Sequence[str], noise: Noise, spread: float | None = None
) -> float:
    """The noise's size in the embeddings' own unit.

    Args:
        lm: the model.
        subjects: whose embeddings tell what a standard deviation is.
        noise: its scale and unit.
        spread: the standard deviation, where it is known.

    Raises:
        RequestError, TokenizationError: as for `embedding_spread`.
    """
    if noise.unit == "absolute":
        return noise.scale
    return noise.scale * (embedding_spread(lm, subjects) if spread is None else spread)


@torch.no_grad()
def embedding_spread(lm: LanguageModel, subjects: Sequence[str]) -> float:
    """Standard deviation of all entries of the embeddings of the subjects' tokens.

    Raises:
        RequestError: there is no subject, or an empty one.
        TokenizationError: a subject has no token of its own.
    """
    if not subjects:
        raise RequestError("there is no subject whose embeddings could be measured.")
    rows = encode_requests(lm, [Request("{}", s, s) for s in subjects], target=False)
    ids = [id_ for row in rows for id_ in row.ids[row.subject_first : row.subject_last + 1]]
    embedded = lm.embedding(torch.tensor(ids, device=lm.device))
    assert isinstance(embedded, Tensor)
    return float(embedded.cpu().double().std())
