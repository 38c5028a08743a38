"""Holding on to what a model says of texts that are like the edits (FT+KL).

The texts are those of a pool that are nearest to each request, by the cosine of their sentence
vectors. A text with the subject of a request in it is no candidate: what it says may have to
change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from errata.editors.background import Background
from errata.editors.config import Config
from errata.editors.difference import Borrowed
from errata.errors import ConfigError
from errata.lm.distributions import distributions, how_many
from errata.lm.forward import Replay
from errata.lm.load import LanguageModel
from errata.lm.sentences import SentenceEncoder, own_vectors
from errata.lm.tokens import batches, encode
from errata.requests import Request

BATCH_TOKENS = 1024
"""Of each, all probabilities are needed twice: 400 MB at a vocabulary of 50,000."""


@dataclass(frozen=True)
class LocalityConfig(Config):
    """What fine-tuning holds on to."""

    weight: float = 0.0
    """How much KL(before || after) on the neighbours counts, in units of the edits' loss; with 0
    there are none."""
    neighbours: int = 5
    """How many texts are held on to for each request: the most similar ones."""
    texts: int = 1000
    """Among how many of the first texts of the corpus neighbours are sought."""
    length: int = 32
    """How many tokens of a text are read."""
    encoder: str = ""
    """A folder or Hub name of a sentence encoder; empty for the model's own states."""

    def __post_init__(self) -> None:
        """Refuse numbers without sense."""
        super().__post_init__()
        self._not_negative("weight")
        self._at_least_one("neighbours", "texts", "length")


@dataclass(frozen=True, eq=False)
class Pool:
    """Texts with their sentence vectors; make one with `of`."""

    config: LocalityConfig
    texts: list[str]
    rows: list[list[int]]
    """Their first tokens."""
    vectors: Tensor
    """(n, width), each of length 1."""
    encoder: SentenceEncoder | None

    @classmethod
    def of(cls, lm: LanguageModel, background: Background, config: LocalityConfig) -> Self:
        """The pool of a model; its states are taken as they are now.

        Raises:
            ConfigError: there is no text.
            DatasetError: the text cannot be read.
            ModelLoadError: there is no such sentence encoder.
            NotFiniteError: states are NaN or infinite.
        """
        if background.corpus is None and lm.kind != "decoder":
            raise ConfigError(
                f"{lm.name} is an {lm.kind} and cannot write texts to hold on to. Give ordinary "
                "text (a corpus), or set kl.weight = 0."
            )
        source = background.text(lm, config.texts * config.length)
        found = [text for text in islice(source, config.texts) if text.strip()]
        if not found:
            raise ConfigError("the corpus has no text to hold on to; give another one.")
        length = min(config.length, lm.max_length)
        rows = lm.tokenizer(found, truncation=True, max_length=length)["input_ids"]
        encoder = SentenceEncoder.load(config.encoder) if config.encoder else None
        vectors = encoder(found) if encoder else own_vectors(lm, rows)
        return cls(config, found, rows, vectors, encoder)

    def nearest(self, lm: LanguageModel, requests: Sequence[Request]) -> list[int]:
        """The numbers of the texts that are most like the requests, each once.

        Raises:
            ConfigError: every text is about the subjects themselves.
        """
        asked = [request.text for request in requests]
        wanted = self.encoder(asked) if self.encoder else own_vectors(lm, encode(lm, asked))
        subjects = {request.subject.strip().casefold() for request in requests}
        apart = [
            number
            for number, text in enumerate(self.texts)
            if not any(subject in text.casefold() for subject in subjects)
        ]
        if not apart:
            raise ConfigError(
                "every text of the corpus names a subject of the edits, so there is none to hold "
                "on to; give more text, or raise kl.texts."
            )
        likeness = wanted @ self.vectors[apart].T
        best = likeness.topk(min(self.config.neighbours, len(apart)), dim=1).indices
        return [apart[place] for place in sorted(set(best.flatten().tolist()))]


@dataclass(frozen=True)
class Held:
    """Texts that are held on to while weights are trained; made with `of`."""

    loan: Borrowed
    groups: list[tuple[list[Sequence[int]], Replay]]
    """Rows of token ids, and what the blocks below the trained ones say to them."""
    before: Tensor | None = None
    """What the model says of all rows by its own weights, where these are few."""

    @classmethod
    def of(cls, loan: Borrowed, rows: Sequence[Sequence[int]], layer: int) -> Self:
        """These rows of token ids, where `layer` is the lowest block that is trained."""
        grouped = batches([len(row) for row in rows], BATCH_TOKENS)
        texts = [[rows[i] for i in group] for group in grouped]
        lm = loan.lm
        groups = [(some, Replay.of(lm, layer, partial(distributions, lm, some))) for some in texts]
        held = cls(loan, groups)
        return replace(held, before=held._own(*groups[0])) if len(groups) == 1 else held

    def divergences(self) -> Iterator[Tensor]:
        """Shares of KL(before || now) in nats, averaged over what the model says of all rows.

        Each has a gradient; together they are the mean. Of many rows, what the model said before is
        computed anew each time: to keep all these probabilities would fill the memory.
        """
        count = sum(how_many(self.loan.lm, some) for some, _ in self.groups)
        for some, below in self.groups:
            before = self._own(some, below) if self.before is None else self.before
            with below.told():
                now = distributions(self.loan.lm, some)
            yield kl_div(now, before, reduction="sum", log_target=True) / count

    @torch.no_grad()
    def _own(self, some: list[Sequence[int]], below: Replay) -> Tensor:
        """What the model says of some rows by its own weights."""
        with below.told(), self.loan.as_before():
            return distributions(self.loan.lm, some)
