"""The page about a result of `errata locate`: figures, the numbers behind them, what was left out.

One self-contained HTML file. Figures are inlined as SVG; whatever a picture shows is also in a
table, for readers who do not see it. Everything that a model or a user wrote is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from errata.jobs.figures import as_svg, check_figure, counted, save_figure
from errata.jobs.files import check_writable, write_text
from errata.jobs.locating import maps, pictures
from errata.jobs.locating.locate import KnowledgeNeurons, Result, save
from errata.jobs.locating.numbers import estimate, number
from errata.jobs.locating.problem_tables import problem_rows
from errata.jobs.locating.problems import Problems
from errata.jobs.locating.regressions import PREDICTORS, table
from errata.jobs.locating.versus import Versus
from errata.jobs.record import now, versions
from errata.jobs.report import page
from errata.locate.neurons import Effect
from errata.locate.saliency import Saliency
from errata.locate.tracing import AverageEffect, Skipped, Trace, Traces, average
from errata.measure.metrics import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12
"""How many facts have a picture of their own."""


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    open: bool = False


@dataclass(frozen=True)
class Section:
    """One figure with what it says."""

    title: str
    lead: str
    figure: str = ""
    """SVG."""
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Places:
    """Where a result goes; None writes nothing of that kind."""

    out: Path | None = None
    """JSON, which `jobs.locate.load` reads back."""
    figure: Path | None = None
    """PNG or SVG."""
    report: Path | None = None
    """HTML or, where the name ends in .md, Markdown that links to the figure."""

    def check(self) -> None:
        """Find out before a long run that something could not be written.

        Raises:
            StorageError: it could not.
        """
        for path in (self.out, self.report):
            if path is not None:
                check_writable(path)
        if self.figure is not None:
            check_figure(self.figure)

    def write(self, result: Result) -> None:
        """Write everything that was asked for.

        Raises:
            StorageError: a file cannot be written.
        """
        if self.out is not None:
            save(result, self.out)
        if self.figure is not None:
            save_figure(figure(result), self.figure)
        if self.report is not None:
            as_text = self.report.suffix == ".md"
            text = markdown(result, self.figure) if as_text else render(result)
            write_text(self.report, text)


def render(result: Result) -> str:
    """The page as text."""
    skipped: tuple[Skipped, ...] = () if isinstance(result, Saliency) else result.skipped
    model = result.traces[0].model if isinstance(result, Traces) else result.model
    return page(
        "locating/report.html",
        version=versions()["errata"],
        title=title(result),
        model=model,
        created=now(),
        sections=list(_sections(result)),
        skipped=skipped,
    )


def markdown(result: Result, picture: Path | None = None) -> str:
    """The tables of the page, with a link to a picture beside it."""
    lines = [f"# {title(result)}"]
    for section in _sections(result):
        lines += ["", f"## {section.title}", "", section.lead]
        if picture is not None:
            lines += ["", f"![{section.title}]({picture.name})"]
            picture = None
        for one in section.tables:
            lines += ["", f"### {one.title}", "", _line(one.columns)]
            lines += [_line(["---"] * len(one.columns)), *map(_line, one.rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def title(result: Result) -> str:
    """What a result is about."""
    if isinstance(result, Traces):
        return f"Causal tracing of {counted(len(by_fact(result)), 'fact')}"
    if isinstance(result, Saliency):
        return f"Gradient saliency for {counted(result.examples, 'fact')}"
    if isinstance(result, KnowledgeNeurons):
        return f"Knowledge neurons of {counted(len(result.facts), 'fact')}"
    if isinstance(result, Problems):
        return "Locating against editing, five problems"
    return f"Locating against editing, {counted(len(result.facts), 'fact')}"


def figure(result: Result) -> Figure:
    """The one picture of a result: of one fact its maps, of several their averages."""
    if isinstance(result, Traces):
        facts = by_fact(result)
        return maps.heat_maps(facts[0]) if len(facts) == 1 else maps.average_lines(averages(result))
    if isinstance(result, Saliency):
        return pictures.saliency_bars(result)
    if isinstance(result, KnowledgeNeurons):
        return pictures.neuron_scatter(result)
    if isinstance(result, Problems):
        return pictures.problem_lines(result)
    return pictures.against_edits(result)


def by_fact(traces: Traces) -> list[tuple[Trace, ...]]:
    """Each fact's traces, one of each kind."""
    kinds = len({trace.kind for trace in traces.traces})
    return [traces.traces[i : i + kinds] for i in range(0, len(traces.traces), kinds)]


def averages(traces: Traces) -> list[AverageEffect]:
    """The average of each kind."""
    return [average(same) for same in zip(*by_fact(traces), strict=True)]


def strongest(traces: Traces, count: int = 3) -> list[tuple[str, str, str, str]]:
    """Where restoring brings back most: (what was restored, token, layer, indirect effect).

    Of one fact, its tokens; of several, their classes, with 95% intervals. Each stands at its best
    layer; the best `count` of each kind of restoration are named.
    """
    facts = by_fact(traces)
    found = []
    for one in averages(traces) if len(facts) > 1 else facts[0]:
        best = [
            (name, *max(enumerate(values), key=lambda place: place[1].mean))
            for name, values in maps.by_token(one)
            if not math.isnan(values[0].mean)
        ]
        for name, layer, effect in sorted(best, key=lambda place: -place[2].mean)[:count]:
            found.append((maps.restored(one), name, str(layer), estimate(effect)))
    return found


def _sections(result: Result) -> Iterator[Section]:
    if isinstance(result, Traces):
        yield from _tracing(result)
    elif isinstance(result, Saliency):
        yield _saliency(result)
    elif isinstance(result, KnowledgeNeurons):
        yield from _neurons(result)
    elif isinstance(result, Problems):
        yield _problems(result)
    else:
        yield from _versus(result)


def _tracing(traces: Traces) -> Iterator[Section]:
    facts = by_fact(traces)
    if len(facts) > 1:
        found = averages(traces)
        lines = maps.average_lines(found)
        yield Section(
            "On average",
            "What comes back of the answer's probability when part of the clean run is restored in "
            "the corrupted one, by token and layer, with 95% intervals.",
            as_svg(lines),
            tuple(_average_table(one) for one in found),
        )
        yield Section(
            "As maps", "The same averages, tokens by layers.", as_svg(maps.average_maps(found))
        )
    for place, fact in enumerate(facts[:SHOWN]):
        first = fact[0]
        lead = (
            f"The clean run gives {first.answer.strip()} {first.clean:.3f}; noise on the subject "
            f"leaves {first.corrupted:.3f} (mean of {first.noise.samples} samples)."
        )
        if place == 0 and len(facts) > SHOWN:
            lead += f" The first {SHOWN} of {len(facts)} facts are shown; the JSON has all."
        drawn = as_svg(maps.heat_maps(fact))
        yield Section(first.request.text, lead, drawn, tuple(map(_trace_table, fact)))


def _trace_table(trace: Trace) -> Table:
    first, last = trace.subject
    return Table(
        f"P({trace.answer.strip()}), restored: {maps.restored(trace)}",
        ("token", *_layers(len(trace.probabilities[0]))),
        tuple(
            (f"{token}{' *' if first <= place <= last else ''}", *(f"{p:.4f}" for p in row))
            for place, (token, row) in enumerate(
                zip(trace.tokens, trace.probabilities, strict=True)
            )
        ),
    )


def _average_table(one: AverageEffect) -> Table:
    return Table(
        f"Mean indirect effect, restored: {maps.restored(one)}",
        ("token", *_layers(len(one.mean[0]))),
        tuple(
            (f"{name} ({counted(values[0].n, 'fact')})", *map(estimate, values))
            for name, values in maps.by_token(one)
        ),
    )


def _saliency(found: Saliency) -> Section:
    standardised = found.standardised or (math.nan,) * len(found.layers)
    layers = tuple(
        (str(layer), f"{naive:.4g}", number(standard))
        for layer, (naive, standard) in enumerate(zip(found.layers, standardised, strict=True))
    )
    modules = tuple(
        (m.path, f"{m.naive:.4g}", number(math.nan if m.standardised is None else m.standardised))
        for m in found.modules
    )
    names = ("mean |gradient|", "standardised")
    compared = (
        "Standardised, in standard deviations above what neutral examples have there."
        if found.neutral
        else "Without neutral examples there is nothing to compare with."
    )
    return Section(
        "By layer",
        "How large the loss's gradient is in each layer: the mean over its parameters and over the "
        f"examples. {compared}",
        as_svg(pictures.saliency_bars(found)),
        (
            Table("By layer", ("layer", *names), layers, open=True),
            Table("By matrix", ("matrix", *names), modules),
        ),
    )


def _neurons(found: KnowledgeNeurons) -> Iterator[Section]:
    yield Section(
        "Where they are",
        "Neurons whose activation the answer's probability is attributed to, in most of the fact's "
        "prompts.",
        as_svg(pictures.neuron_scatter(found)),
    )
    for fact in found.facts:
        neurons = tuple((f"layer {n.layer}", str(n.index), f"{n.score:.4f}") for n in fact.neurons)
        times = f"{fact.effect.factor:g} times"
        checked = tuple(
            (
                f"{r.prompt} [{r.answer.strip()}]",
                number(r.before),
                number(r.suppressed),
                number(r.amplified),
            )
            for r in (*fact.effect.facts, *fact.effect.others)
        )
        yield Section(
            f"{fact.request.text} \N{RIGHTWARDS ARROW} {fact.neurons.answer.strip()}",
            f"Found with {counted(len(fact.neurons.prompts), 'prompt')}. Below, the probability "
            "of answers with these neurons silent and amplified: the fact's own prompts first, "
            "then other facts, which should not change.",
            tables=(
                Table("Neurons", ("layer", "neuron", "attribution"), neurons, open=True),
                Table("Check", ("prompt", "as it is", "silent", times), checked, open=True),
            ),
        )


def _versus(found: Versus) -> Iterator[Section]:
    yield Section(
        "Does locating a fact tell where to edit it?",
        f"{counted(len(found.facts), 'fact')}, each edited by {found.method} in each layer alone. "
        "The rewrite score is the share of the possible that the new target's probability gained; "
        "the tracing effect is the largest over the prompt's tokens. If tracing told where to "
        "edit, it would explain scores beyond the layer's own mean.",
        as_svg(pictures.against_edits(found)),
        tuple(Table(*parts, open=True) for parts in versus_rows(found)),
    )


def versus_rows(found: Versus) -> list[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]]:
    """The study's two tables: title, columns, rows."""
    explained = tuple((features(one.features), estimate(one.r2, 3)) for one in found.explained)
    of = {(c.predictor, c.layer): estimate(c.r) for c in found.correlations}
    by_layer = tuple(
        (
            f"layer {layer}",
            estimate(interval(scores, within=(0.0, 1.0))),
            f"{failed:.0f}",
            *(of[predictor, layer] for predictor in PREDICTORS),
        )
        for layer, scores, failed in zip(
            found.layers,
            table(found.facts, "score").T,
            table(found.facts, "failed").sum(axis=0),
            strict=True,
        )
    )
    names = ("r, state", "r, MLPs", "r, saliency")
    return [
        ("Variance of the rewrite score explained", ("by", "R²"), explained),
        (
            "Layer by layer; r is the correlation with the rewrite score over the facts",
            ("", "rewrite score", "edits failed", *names),
            by_layer,
        ),
    ]


def _problems(found: Problems) -> Section:
    return Section(
        "What is to be done with the fact, by which method, in which layer",
        "Each fact edited in each layer alone. The rewrite score is the share of the possible that "
        "an edit reached; overall, with the paraphrase's and how well a neighbour's probability "
        "stayed. If tracing told where to edit, it would explain scores beyond the layer's mean.",
        as_svg(pictures.problem_lines(found)),
        tuple(Table(*parts, open=True) for parts in problem_rows(found)),
    )


def reactions(effect: Effect) -> list[tuple[str, str, str, str]]:
    """Mean probabilities as they are, silent and amplified: of the fact, then of others."""
    groups = {"the answer": effect.facts, "other facts' answers": effect.others}
    return [
        (
            name,
            number(fmean(r.before for r in some)),
            number(fmean(r.suppressed for r in some)),
            number(fmean(r.amplified for r in some)),
        )
        for name, some in groups.items()
        if some
    ]


def features(names: Sequence[str]) -> str:
    """What a regression goes by, in words."""
    return " + ".join("layer" if name == "layer" else pictures.NAMES[name] for name in names)


def _layers(count: int) -> tuple[str, ...]:
    return tuple(f"layer {layer}" if layer == 0 else str(layer) for layer in range(count))
