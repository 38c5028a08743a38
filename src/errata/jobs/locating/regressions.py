"""How an edit's score in each layer goes with what locating says of the layer: the statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from errata.measure.metrics import Z95, Estimate
from errata.requests import Request

Predictor = Literal["state", "mlp", "saliency"]
PREDICTORS: tuple[Predictor, ...] = ("state", "mlp", "saliency")
"""What locating says of a layer: tracing of one state, of a window of MLPs, gradient saliency."""

MODELS: tuple[tuple[str, ...], ...] = (
    ("layer",),
    ("state",),
    ("mlp",),
    ("saliency",),
    ("layer", "state"),
    ("layer", "mlp"),
    ("layer", "saliency"),
)
"""Features of the regressions of the rewrite score."""

RESAMPLES = 1000
"""Bootstrap samples of facts behind an interval of R²."""


@dataclass(frozen=True)
class Located:
    """One fact, layer by layer: what locating says, and what an edit there does."""

    request: Request
    state: tuple[float, ...]
    """Largest indirect effect of restoring one state of the layer, over all tokens."""
    mlp: tuple[float, ...]
    """The same for the window of MLP outputs around the layer."""
    saliency: tuple[float, ...]
    """Mean |gradient| of the edit's loss over the layer's MLP."""
    score: tuple[float, ...]
    """The rewrite score of an edit of this layer alone; 0 where the edit failed."""
    failed: tuple[bool, ...]
    """Whether the method found no edit there."""
    paraphrase: tuple[float, ...] = ()
    """The same score of the first paraphrase, where there is one (NaN: this fact has none)."""
    neighbour: tuple[float, ...] = ()
    """How well the target's probability stayed after the first neighbour's prompt."""
    overall: tuple[float, ...] = ()
    """The harmonic mean of these three scores."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `as_json` made of it."""
        numbers = {
            name: tuple(math.nan if x is None else x for x in values[name])
            for name in ("state", "mlp", "saliency", "score", "paraphrase", "neighbour", "overall")
            if name in values
        }
        request, failed = Request.from_dict(values["request"]), tuple(map(bool, values["failed"]))
        return cls(request, failed=failed, **numbers)


def table(facts: Sequence[Located], name: str) -> NDArray[np.float64]:
    """(facts, layers) one of a fact's quantities."""
    return np.array([getattr(fact, name) for fact in facts], dtype=float)


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> Estimate:
    """Pearson's r of two columns with Fisher's interval; NaN where one of them is constant."""
    n = len(x)
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(math.nan, math.nan, math.nan, n)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if n < 4 or abs(r) == 1:
        return Estimate(r, math.nan, math.nan, n)
    half = Z95 / math.sqrt(n - 3)
    return Estimate(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), n)


def explained(facts: Sequence[Located], features: Sequence[str], *, seed: int = 0) -> Estimate:
    """R² of the least-squares regression of the rewrite score on some features.

    Args:
        facts: each gives one row for each layer.
        features: "layer" (a category: an intercept of its own for each) and predictors.
        seed: of the bootstrap, which draws facts with all their layers.
    """
    return _interval(_resampled(facts, features, seed), facts)


def added(facts: Sequence[Located], predictor: Predictor, *, seed: int = 0) -> Estimate:
    """How much R² grows where the regression on the layer also knows what locating says.

    Both regressions are of the same bootstrap samples.
    """
    alone = _resampled(facts, ["layer"], seed)
    return _interval(_resampled(facts, ["layer", predictor], seed) - alone, facts)


def _interval(r2: NDArray[np.float64], facts: Sequence[Located]) -> Estimate:
    """The first value, with the interval of the others."""
    n = len(facts) * len(facts[0].score)
    if np.isnan(r2[0]):
        return Estimate(math.nan, math.nan, math.nan, n)
    low, high = np.nanquantile(r2[1:], (0.025, 0.975))
    return Estimate(float(r2[0]), float(low), float(high), n)


def _resampled(facts: Sequence[Located], features: Sequence[str], seed: int) -> NDArray[np.float64]:
    """(1 + RESAMPLES,) R² of the facts, and of bootstrap samples of them."""
    score = table(facts, "score")
    n, layers = score.shape
    columns = [np.broadcast_to(np.eye(layers), (n, layers, layers))]
    if "layer" not in features:
        columns = [np.ones((n, layers, 1))]
    for name in features:
        if name != "layer":
            values = table(facts, name)
            columns.append(((values - values.mean()) / (values.std() or 1.0))[..., None])
    # Least squares needs the products of all columns alone, and these add up over facts: a
    # bootstrap sample is a weighted sum of n small matrices.
    rows = np.concatenate([*columns, np.ones((n, layers, 1)), score[..., None]], axis=-1)
    products = np.einsum("nli,nlj->nij", rows, rows).reshape(n, -1)
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=RESAMPLES)
    weights = np.concatenate([np.ones((1, n)), draws])
    return _r_squared((weights @ products).reshape(-1, rows.shape[-1], rows.shape[-1]))


def _r_squared(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """(b,) from (b, k + 2, k + 2) products of k features, ones and the score; NaN if constant."""
    among, with_score = products[:, :-2, :-2], products[:, :-2, -1]
    count, total, squares = products[:, -2, -2], products[:, -2, -1], products[:, -1, -1]
    fitted = np.einsum(
        "bi,bij,bj->b", with_score, np.linalg.pinv(among, hermitian=True), with_score
    )
    mean = total**2 / count
    varies = squares - mean > 1e-12 * np.maximum(squares, 1e-300)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(varies, np.clip((fitted - mean) / (squares - mean), 0.0, 1.0), np.nan)
