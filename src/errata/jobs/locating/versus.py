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
from typing import Any, Self

from errata.editors import Background, Editor
from errata.edits.edit import as_json
from errata.errors import ErrataError, RequestError
from errata.jobs.layers import window_for
from errata.jobs.locating.regressions import (
    MODELS,
    PREDICTORS,
    Located,
    Predictor,
    correlation,
    explained,
    table,
)
from errata.jobs.methods import editor_for
from errata.jobs.models import Model, as_model
from errata.jobs.moments import Corpus, background_for
from errata.jobs.variants import posed
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.locate.saliency import saliency
from errata.locate.tracing import Noise, Skipped, Trace, trace_all
from errata.measure.metrics import Estimate
from errata.measure.shares import Shares, case_probabilities, shares
from errata.progress import Progress, silent
from errata.requests import INJECTION, Case, Request


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
        variant: str = INJECTION,
        skipped: Sequence[Skipped] = (),
    ) -> Self:
        """The study of these measurements, with its correlations and regressions."""
        return cls(
            model=model,
            method=method,
            window=window,
            layers=tuple(layers),
            variant=variant,
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
            variant=values.get("variant", INJECTION),
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
    editing = Editing.of(lm, method, settings, chosen, background_for(lm, corpus), progress)
    left_out: list[Skipped] = []
    if variant is not None:
        cases, left_out = posed(lm, cases, variant)
    traces = effects(lm, cases, window=span, noise=noise, progress=progress)
    known = [case for case in cases if case.request.text in traces.state]
    if len(known) < 2:
        raise RequestError(
            f"{lm.name} knows {len(known)} of the {len(facts)} facts, and what it does not know "
            "cannot be traced. Give more facts that it knows."
        )
    return Versus.of(
        model=lm.name,
        method=method,
        window=span,
        layers=chosen,
        variant=known[0].request.variant,
        facts=located(lm, known, traces, editing, progress=progress),
        skipped=(*left_out, *traces.skipped),
    )


@dataclass(frozen=True)
class Effects:
    """What tracing says of each layer, by the fact's text."""

    state: Mapping[str, tuple[float, ...]]
    mlp: Mapping[str, tuple[float, ...]]
    skipped: tuple[Skipped, ...]


def effects(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    window: int,
    noise: Noise | None = None,
    progress: Progress = silent,
) -> Effects:
    """Trace the facts that the model knows, states and MLPs; the variant plays no part.

    Raises:
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
    found: dict[str, dict[str, tuple[float, ...]]] = {"state": {}, "mlp": {}}
    for trace in traces.traces:
        found[trace.kind][trace.request.text] = largest(trace)
    return Effects(found["state"], found["mlp"], traces.skipped)


@dataclass(frozen=True)
class Editing:
    """A method on one model: an editor for each layer alone."""

    layers: tuple[int, ...]
    editors: tuple[Editor, ...]

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        method: str,
        settings: Mapping[str, Any] | None,
        layers: Sequence[int],
        background: Background,
        progress: Progress,
    ) -> Self:
        """Make the editors; of the model, as it is now, what they all need is taken in one pass.

        Raises:
            ConfigError: the method, a setting or a layer is unknown.
        """

        def editing(some: Sequence[int]) -> Editor:
            return editor_for(lm, method, {**(settings or {}), "layers": list(some)}, background)

        # All layers at once: one pass over the text, and a layer that there is not is refused now.
        editing(layers).prepare(lm, progress=progress)
        return cls(tuple(layers), tuple(editing([layer]) for layer in layers))


def located(
    lm: LanguageModel,
    cases: Sequence[Case],
    traces: Effects,
    editing: Editing,
    *,
    progress: Progress = silent,
) -> list[Located]:
    """Edit each of some traced cases in each layer, alone.

    Raises:
        RequestError: the method does not honour the requests' variant.
    """
    before = case_probabilities(lm, cases)
    columns = []
    for done, editor in enumerate(editing.editors):
        progress("edits, layer by layer", done, len(editing.editors))
        columns.append(list(_edited(lm, cases, editor, before)))
    progress("edits, layer by layer", len(editing.editors), len(editing.editors))
    found = []
    for i, case in enumerate(cases):
        request = case.request
        weight = saliency(lm, [Example(request.text, request.target)], modules="mlp").layers
        mine = [column[i] for column in columns]
        scores = {
            name: tuple(found.get(name, math.nan) for found, _ in mine)
            for name in ("rewrite", "paraphrases", "neighbours", "S")
        }
        found.append(
            Located(
                request,
                state=_at(traces.state[request.text], editing.layers),
                mlp=_at(traces.mlp[request.text], editing.layers),
                saliency=_at(weight, editing.layers),
                score=scores["rewrite"],
                failed=tuple(failed for _, failed in mine),
                paraphrase=scores["paraphrases"],
                neighbour=scores["neighbours"],
                overall=scores["S"],
            )
        )
    return found


def _edited(
    lm: LanguageModel, cases: Sequence[Case], editor: Editor, before: Sequence[Mapping[str, float]]
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


def _at(values: Sequence[float], layers: Sequence[int]) -> tuple[float, ...]:
    return tuple(values[layer] for layer in layers)
