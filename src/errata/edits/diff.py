"""How two edits, or stacks, differ: facts, layers, norms, directions and keys.

Notation: changes A, B (d_out, d_in) to one weight, each left @ right with n columns and rows.
- cosine = <A, B> / (|A| |B|) in the trace inner product, through the factors;
- overlap of keys = the mean of cos^2 over the principal angles between the row spaces of the
  right factors, `|Q_A Q_B^T|^2 / min(rank)`: 1 where one space holds the other, 0 where they are
  orthogonal. Keys that overlap are where two edits can disturb each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.algebra.precision import wide
from errata.edits.edit import Edit
from errata.edits.stack import weight_changes
from errata.errors import WrongModelError
from errata.requests import Request


@dataclass(frozen=True)
class LayerDifference:
    """Two changes to one weight; norms are Frobenius norms."""

    path: str
    norm_a: float
    norm_b: float
    norm_difference: float
    """|A - B|."""
    cosine: float
    """Between A and B; 0 where one of them changes nothing."""
    overlap: float
    """Of keys, 0 to 1; 0 where one of them changes nothing."""


@dataclass(frozen=True)
class Difference:
    """What sets edit a and edit b apart."""

    only_a: tuple[Request, ...]
    """Facts that only a writes."""
    only_b: tuple[Request, ...]
    """Facts that only b writes."""
    shared: tuple[Request, ...]
    """Facts that both write, as a has them."""
    contradictions: tuple[tuple[Request, Request], ...]
    """One prompt, two targets: what a wants, what b wants."""
    layers: tuple[LayerDifference, ...]
    """One for each weight that either changes, by path."""

    def fact_rows(self) -> list[tuple[str, str, str]]:
        """(where, prompt, target) of each fact that is not shared, contradictions first."""
        rows = [
            ("a against b", a.text, f"{a.target.strip()} | {b.target.strip()}")
            for a, b in self.contradictions
        ]
        for where, facts in ("only a", self.only_a), ("only b", self.only_b):
            rows += [(where, fact.text, fact.target.strip()) for fact in facts]
        return rows

    def layer_rows(self) -> list[tuple[str, ...]]:
        """(weight, |A|, |B|, |A - B|, cosine, overlap of keys) of each layer, as text."""
        return [
            (
                layer.path,
                *(f"{x:.4g}" for x in (layer.norm_a, layer.norm_b, layer.norm_difference)),
                f"{layer.cosine:.3f}",
                f"{layer.overlap:.3f}",
            )
            for layer in self.layers
        ]


LAYER_HEADINGS = ("weight", "|A|", "|B|", "|A - B|", "cosine", "overlap of keys")
"""What the columns of `Difference.layer_rows` are."""


def diff(a: Edit, b: Edit) -> Difference:
    """Compare two edits or stacks; where a stack writes one prompt twice, the last counts.

    Raises:
        WrongModelError: they change weights of different shapes: they are for different models.
    """
    facts_a = {request.text: request for request in a.requests}
    facts_b = {request.text: request for request in b.requests}
    both = [(facts_a[text], facts_b[text]) for text in facts_a if text in facts_b]
    agree = [x.target.strip() == y.target.strip() for x, y in both]
    changes_a, changes_b = weight_changes(a), weight_changes(b)
    paths = dict.fromkeys([*changes_a, *changes_b])
    return Difference(
        only_a=tuple(fact for text, fact in facts_a.items() if text not in facts_b),
        only_b=tuple(fact for text, fact in facts_b.items() if text not in facts_a),
        shared=tuple(x for (x, _), same in zip(both, agree, strict=True) if same),
        contradictions=tuple(pair for pair, same in zip(both, agree, strict=True) if not same),
        layers=tuple(_layer(path, changes_a.get(path), changes_b.get(path)) for path in paths),
    )


def _layer(path: str, a: LowRank | None, b: LowRank | None) -> LayerDifference:
    some = a or b
    assert some is not None
    a, b = a or LowRank.zero(*some.shape), b or LowRank.zero(*some.shape)
    if a.shape != b.shape:
        raise WrongModelError(
            f"the edits are for different models: {path} is {a.shape} in one and {b.shape} in "
            "the other."
        )
    norm_a, norm_b = a.norm(), b.norm()
    return LayerDifference(
        path=path,
        norm_a=norm_a,
        norm_b=norm_b,
        norm_difference=(a + b.scaled(-1)).norm(),
        cosine=a.inner(b) / (norm_a * norm_b) if norm_a and norm_b else 0.0,
        overlap=_overlap(a.right, b.right),
    )


def _overlap(a: Tensor, b: Tensor) -> float:
    """Mean of cos^2 over the principal angles between two row spaces."""
    base_a, base_b = _row_space(a), _row_space(b.to(a.device))
    smaller = min(len(base_a), len(base_b))
    return float((base_a @ base_b.mT).square().sum()) / smaller if smaller else 0.0


def _row_space(rows: Tensor) -> Tensor:
    """An orthonormal basis of the space that the rows span, (rank, d_in)."""
    _, sizes, basis = torch.linalg.svd(wide(rows), full_matrices=False)
    noise = torch.finfo(rows.dtype).eps * max(rows.shape)
    kept: Tensor = basis[sizes > noise * sizes.max()] if len(sizes) else basis
    return kept
