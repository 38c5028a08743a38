"""Weights that are trained on copies, and what the training changed, as factors.

While `borrowed` is open, copies stand in the model in the place of some of its weights. They are
kept in float32 or wider; a model in half precision runs on them rounded. The model's own weights
are not touched: afterwards they stand in their place again, the same tensors as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.algebra.low_rank import LowRank
from errata.algebra.precision import wide
from errata.lm.forward import frozen
from errata.lm.load import LanguageModel
from errata.lm.weights import out_in


@dataclass(frozen=True, eq=False)
class Borrowed:
    """Some weights of a model, under training; make one with `borrowed`."""

    lm: LanguageModel
    paths: tuple[str, ...]
    parameters: list[nn.Parameter]
    """What the model runs on; of all its parameters these alone ask for a gradient."""
    own: list[Tensor]
    """The model's own weights, laid out as the parameters."""
    copies: list[Tensor]
    """What is trained, laid out as the parameters, in float32 or wider."""

    def show_(self) -> None:
        """Let the model run on the copies as they are now."""
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            parameter.data = copy.to(parameter.dtype)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """While open, the model runs on its own weights."""
        for parameter, own in zip(self.parameters, self.own, strict=True):
            parameter.data = own
        try:
            yield
        finally:
            self.show_()

    def moved(self) -> dict[str, Tensor]:
        """Path -> the change (d_out, d_in) of each weight so far."""
        return {
            path: out_in(self.lm.module(path), copy - own.to(copy.dtype))
            for path, copy, own in zip(self.paths, self.copies, self.own, strict=True)
        }


@contextmanager
def borrowed(lm: LanguageModel, paths: Sequence[str]) -> Iterator[Borrowed]:
    """While open, the weights at these paths may be trained; the model is then as it was."""
    parameters = [_parameter(lm, path) for path in paths]
    own = [parameter.data for parameter in parameters]
    copies = [w.to(torch.promote_types(w.dtype, torch.float32), copy=True) for w in own]
    loan = Borrowed(lm, tuple(paths), parameters, own, copies)
    with frozen(lm):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            loan.show_()
            yield loan
        finally:
            for parameter, weight in zip(parameters, own, strict=True):
                parameter.data = weight
                parameter.requires_grad_(False)


def factors(change: Tensor, rank: int | None) -> tuple[LowRank, float]:
    """A change (d_out, d_in) as factors, and by how much they miss it, relative to its norm.

    Without a rank they are the change itself and an identity: exact. With one they are the nearest
    matrix of that rank: the projection on the leading left singular vectors, which are found as
    eigenvectors of D D^T (or of D^T D, whichever is smaller).
    """
    d_out, d_in = change.shape
    if rank is None or rank >= min(d_out, d_in):
        return LowRank.exact(change), 0.0
    if d_in < d_out:
        found, missed = factors(change.mT, rank)
        return LowRank(found.right.mT.contiguous(), found.left.mT.contiguous()), missed
    exact = wide(change)
    vectors = torch.linalg.eigh(exact @ exact.mT).eigenvectors[:, -rank:]
    found = LowRank(vectors, vectors.mT @ exact)
    size = float(exact.norm())
    missed = float((exact - found.dense()).norm()) / size if size else 0.0
    return found.to(dtype=change.dtype), missed


def _parameter(lm: LanguageModel, path: str) -> nn.Parameter:
    weight = lm.module(path).weight
    assert isinstance(weight, nn.Parameter)
    return weight
