"""Does locating a fact tell where to edit it? (Hase et al. 2023, arXiv:2301.04213).

For each fact and each layer three things are measured: what causal tracing says of the layer (the
largest indirect effect over all tokens, of a state and of a window of MLPs), how salient the layer
is for the edit, and how well an edit of that layer alone does:

    rewrite score = max(0, (p*(new) - p(new)) / (1 - p(new)))

with p the model's probability of the new target, the product over its tokens, and p* the edited
model's. If locating informed editing, facts that trace to a layer would be better edited there: a
correlation in each layer, and a regression of the score on layer *and* tracing effect that explains
more than the layer alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from errata.editors import Editor
from errata.edits.edit import Edit, as_json
from errata.errors import ErrataError, RequestError
from errata.jobs.layers import window_for
from errata.jobs.methods import editor_for
from errata.jobs.models import Model, as_model
from errata.jobs.moments import Corpus, background_for
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.locate.saliency import saliency
from errata.locate.tracing import Noise, Skipped, Trace, trace_all
from errata.measure.likelihood import judge
from errata.measure.metrics import Z95, Estimate
from errata.progress import Progress, silent
from errata.requests import Case, Request

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


@dataclass(frozen=True)
class Correlation:
    """How one predictor goes with the rewrite score, over the facts, in one layer."""

    predictor: Predictor
    layer: int
    r: Estimate
    """Pearson's, with Fisher's 95% interval; NaN where either side is constant."""


@dataclass(frozen=True)
class Explained:
    """How much of the rewrite score's variance, over facts and layers, some features explain."""

    features: tuple[str, ...]
    r2: Estimate
    """R² of the linear regression; the interval is a bootstrap over facts."""


@dataclass(frozen=True)
class Versus:
    """Locating against editing, on one model with one method."""

    model: str
    method: str
    window: int
    """How many layers' MLP outputs one restoration puts back."""
    layers: tuple[int, ...]
    """Which layers were measured; each fact's numbers are in this order."""
    facts: tuple[Located, ...]
    skipped: tuple[Skipped, ...]
    """Facts that the model does not know: they cannot be traced."""
    correlations: tuple[Correlation, ...]
    explained: tuple[Explained, ...]

    @classmethod
    def of(
        cls,
        *,
        model: str,
        method: str,
        window: int,
        layers: Sequence[int],
        facts: Sequence[Located],
        skipped: Sequence[Skipped] = (),
    ) -> Self:
        """The study of these measurements, with its correlations and regressions."""
        return cls(
            model=model,
            method=method,
            window=window,
            layers=tuple(layers),
            facts=tuple(facts),
            skipped=tuple(skipped),
            correlations=tuple(
                Correlation(predictor, layer, correlation(x[:, place], y[:, place]))
                for predictor in PREDICTORS
                for x, y in [(table(facts, predictor), table(facts, "score"))]
                for place, layer in enumerate(layers)
            ),
            explained=tuple(Explained(names, explained(facts, names)) for names in MODELS),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        record: dict[str, Any] = as_json(self)
        return record

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        facts = [
            Located(
                Request.from_dict(fact["request"]),
                *(tuple(fact[name]) for name in ("state", "mlp", "saliency", "score", "failed")),
            )
            for fact in values["facts"]
        ]
        return cls.of(
            model=values["model"],
            method=values["method"],
            window=values["window"],
            layers=values["layers"],
            facts=facts,
            skipped=[
                Skipped(Request.from_dict(one["request"]), one["predicted"], one["why"])
                for one in values["skipped"]
            ],
        )


def versus(
    model: Model,
    facts: Sequence[Request | Case],
    *,
    method: str = "rome",
    settings: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    window: int | None = None,
    noise: Noise | None = None,
    corpus: Corpus = None,
    progress: Progress = silent,
) -> Versus:
    """Trace, weigh and edit each fact in each layer.

    Args:
        model: the model or its name; it is left as it was.
        facts: requests, or cases whose requests are meant; what the model does not know is skipped.
        method: a name in `EDITORS`; it edits one layer at a time here.
        settings: the method's numbers that differ from the recipe's.
        layers: which to measure; all by default.
        window: how many layers' MLP outputs are restored at once; see `window_for`.
        noise: what hides the subjects; the papers' by default.
        corpus: ordinary text for the second moments.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the method, a setting or a layer is unknown.
        RequestError: the model knows fewer than two of the facts.
    """
    lm = as_model(model)
    requests = [fact.request if isinstance(fact, Case) else fact for fact in facts]
    span = window or window_for(lm)
    chosen = tuple(range(lm.layers)) if layers is None else tuple(sorted(set(layers)))
    background = background_for(lm, corpus)

    def editing(some: Sequence[int]) -> Editor:
        return editor_for(lm, method, {**(settings or {}), "layers": list(some)}, background)

    # All layers at once: one pass over the text, and a layer that there is not is refused now.
    editing(chosen).prepare(lm, progress=progress)
    traces = trace_all(
        lm,
        requests,
        kinds=("state", "mlp"),
        window=span,
        noise=noise or Noise(),
        progress=progress,
    )
    peaks: dict[tuple[str, Request], tuple[float, ...]] = {
        (trace.kind, trace.request): largest(trace) for trace in traces.traces
    }
    known = [request for kind, request in peaks if kind == "state"]
    if len(known) < 2:
        raise RequestError(
            f"{lm.name} knows {len(known)} of the {len(requests)} facts, and what it does not know "
            "cannot be traced. Give more facts that it knows."
        )
    weights = [
        saliency(lm, [Example(request.text, request.target)], modules="mlp").layers
        for request in known
    ]
    editors = [editing([layer]) for layer in chosen]
    scores, failed = _rewritten(lm, known, editors, progress)
    measured = [
        Located(
            request,
            state=_at(peaks["state", request], chosen),
            mlp=_at(peaks["mlp", request], chosen),
            saliency=_at(weights[i], chosen),
            score=tuple(column[i] for column in scores),
            failed=tuple(column[i] for column in failed),
        )
        for i, request in enumerate(known)
    ]
    return Versus.of(
        model=lm.name,
        method=method,
        window=span,
        layers=chosen,
        facts=measured,
        skipped=traces.skipped,
    )


def largest(trace: Trace) -> tuple[float, ...]:
    """Each layer's largest indirect effect over the tokens, as Hase et al. take it."""
    return tuple(max(column) for column in zip(*trace.effects, strict=True))


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
    r2 = _r_squared((weights @ products).reshape(-1, rows.shape[-1], rows.shape[-1]))
    low, high = np.nanquantile(r2[1:], (0.025, 0.975)) if not np.isnan(r2[0]) else (np.nan, np.nan)
    return Estimate(float(r2[0]), float(low), float(high), n * layers)


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


def _at(values: Sequence[float], layers: Sequence[int]) -> tuple[float, ...]:
    return tuple(values[layer] for layer in layers)


def _rewritten(
    lm: LanguageModel,
    requests: Sequence[Request],
    editors: Sequence[Editor],
    progress: Progress,
) -> tuple[list[list[float]], list[list[bool]]]:
    """Rewrite scores and failures, editor by editor and, for each, request by request."""
    before = probabilities(lm, requests)
    scores: list[list[float]] = []
    failed: list[list[bool]] = []
    for done, editor in enumerate(editors):
        progress("edits, layer by layer", done, len(editors))
        edits = list(editor.edit_each(lm, [[request] for request in requests], progress=silent))
        after = _each_after(lm, requests, edits, before)
        scores.append([rewrite_score(p, q) for p, q in zip(before, after, strict=True)])
        failed.append([isinstance(edit, ErrataError) for edit in edits])
    progress("edits, layer by layer", len(editors), len(editors))
    return scores, failed


def _each_after(
    lm: LanguageModel,
    requests: Sequence[Request],
    edits: Sequence[Edit | ErrataError],
    before: Sequence[float],
) -> Iterator[float]:
    """Each request's probability with its own edit alone; as before where there is none."""
    for request, edit, p in zip(requests, edits, before, strict=True):
        if isinstance(edit, ErrataError):
            yield p
        else:
            with edit.applied(lm):
                yield probabilities(lm, [request])[0]


def probabilities(lm: LanguageModel, requests: Sequence[Request]) -> list[float]:
    """The probability of each request's target: the product over its tokens."""
    pairs = [(request.text, request.target) for request in requests]
    judged = judge(lm, pairs)
    return [math.exp(sum(judged[pair].logprobs)) for pair in pairs]


def rewrite_score(before: float, after: float) -> float:
    """The share of what was possible that an edit reached: 0 for none, 1 for certainty."""
    return max(0.0, (after - before) / (1 - before)) if before < 1 else 0.0
