"""Does locating a fact tell where to edit it? (Hase et al. 2023, arXiv:2301.04213).

For each fact and each layer three things are measured: what causal tracing says of the layer (the
largest indirect effect over all tokens, of a state and of a window of MLPs), how salient the layer
is for the edit, and how well an edit of that layer alone does:

    rewrite score = max(0, (p*(new) - p(new)) / (1 - p(new)))

with p the model's probability of the target, the product over its tokens, and p* the edited
model's; where the target should be said less, max(0, (p - p*) / p). If locating informed editing,
facts that trace to a layer would be better edited there: a correlation in each layer, and a
regression of the score on layer *and* tracing effect that explains more than the layer alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from errata.editors import Editor
from errata.edits.edit import as_json
from errata.errors import ErrataError, RequestError
from errata.jobs.layers import window_for
from errata.jobs.methods import editor_for
from errata.jobs.models import Model, as_model
from errata.jobs.moments import Corpus, background_for
from errata.jobs.variants import posed
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.locate.saliency import saliency
from errata.locate.tracing import Noise, Skipped, Trace, trace_all
from errata.measure.metrics import Z95, Estimate
from errata.measure.shares import Shares, case_probabilities, shares
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
    variant: str
    """What the edits were to do: a name in `VARIANTS`."""
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
            variant=facts[0].request.variant,
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
        facts = [Located.from_dict(fact) for fact in values["facts"]]
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
    variant: str | None = None,
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
        variant: pose the facts as this problem first (see `posed`); by default they stay as they
            are.
        window: how many layers' MLP outputs are restored at once; see `window_for`.
        noise: what hides the subjects in tracing; the papers' by default.
        corpus: ordinary text for the second moments.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the method, a setting or a layer is unknown.
        RequestError: the model knows fewer than two of the facts, the variant is unknown, or the
            method does not honour it.
    """
    lm = as_model(model)
    cases = [fact if isinstance(fact, Case) else Case(fact) for fact in facts]
    span = window or window_for(lm)
    chosen = tuple(range(lm.layers)) if layers is None else tuple(sorted(set(layers)))
    background = background_for(lm, corpus)

    def editing(some: Sequence[int]) -> Editor:
        return editor_for(lm, method, {**(settings or {}), "layers": list(some)}, background)

    # All layers at once: one pass over the text, and a layer that there is not is refused now.
    editing(chosen).prepare(lm, progress=progress)
    left_out: list[Skipped] = []
    if variant is not None:
        cases, left_out = posed(lm, cases, variant)
    traces = effects(lm, cases, window=span, noise=noise, progress=progress)
    known = [case for case in cases if case.request in traces.state]
    if len(known) < 2:
        raise RequestError(
            f"{lm.name} knows {len(known)} of the {len(facts)} facts, and what it does not know "
            "cannot be traced. Give more facts that it knows."
        )
    measured = _measured(
        lm, known, traces, [editing([layer]) for layer in chosen], chosen, progress
    )
    return Versus.of(
        model=lm.name,
        method=method,
        window=span,
        layers=chosen,
        facts=measured,
        skipped=(*left_out, *traces.skipped),
    )


@dataclass(frozen=True)
class Effects:
    """What tracing says of each layer, by request."""

    state: Mapping[Request, tuple[float, ...]]
    mlp: Mapping[Request, tuple[float, ...]]
    skipped: tuple[Skipped, ...]


def effects(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    window: int,
    noise: Noise | None = None,
    progress: Progress = silent,
) -> Effects:
    """Trace the facts that the model knows, states and MLPs.

    Raises:
        RequestError: there is no fact.
        ConfigError: the model is not a decoder.
    """
    if not cases:
        return Effects({}, {}, ())
    traces = trace_all(
        lm,
        [case.request for case in cases],
        kinds=("state", "mlp"),
        window=window,
        noise=noise or Noise(),
        progress=progress,
    )
    found: dict[str, dict[Request, tuple[float, ...]]] = {"state": {}, "mlp": {}}
    for trace in traces.traces:
        found[trace.kind][trace.request] = largest(trace)
    return Effects(found["state"], found["mlp"], traces.skipped)


def _measured(
    lm: LanguageModel,
    cases: Sequence[Case],
    traces: Effects,
    editors: Sequence[Editor],
    layers: Sequence[int],
    progress: Progress,
) -> list[Located]:
    """Each case, layer by layer, with the editor of each."""
    before = case_probabilities(lm, cases)
    columns = []
    for done, editor in enumerate(editors):
        progress("edits, layer by layer", done, len(editors))
        columns.append(list(_edited(lm, cases, editor, before)))
    progress("edits, layer by layer", len(editors), len(editors))
    found = []
    for i, case in enumerate(cases):
        request = case.request
        weight = saliency(lm, [Example(request.text, request.target)], modules="mlp").layers
        mine = [column[i] for column in columns]

        def score(name: str, mine: Sequence[tuple[Shares, bool]] = mine) -> tuple[float, ...]:
            return tuple(shares.get(name, math.nan) for shares, _ in mine)

        found.append(
            Located(
                request,
                state=_at(traces.state[request], layers),
                mlp=_at(traces.mlp[request], layers),
                saliency=_at(weight, layers),
                score=score("rewrite"),
                failed=tuple(failed for _, failed in mine),
                paraphrase=score("paraphrases"),
                neighbour=score("neighbours"),
                overall=score("S"),
            )
        )
    return found


def _edited(
    lm: LanguageModel,
    cases: Sequence[Case],
    editor: Editor,
    before: Sequence[Mapping[str, float]],
) -> Iterator[tuple[Shares, bool]]:
    """Each case's scores with its own edit alone, and whether there was none."""
    edits = editor.edit_each(lm, [[case.request] for case in cases], progress=silent)
    for case, edit, p in zip(cases, edits, before, strict=True):
        if isinstance(edit, ErrataError):
            yield shares(case.request, p, p), True
        else:
            with edit.applied(lm):
                after = case_probabilities(lm, [case])[0]
            yield shares(case.request, p, after), False


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
