"""Pictures of saliency, knowledge neurons, and locating against editing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.jobs.figures import (
    COLOURS,
    SOFT,
    blank,
    clipped,
    counted,
    draw_line,
    head,
    layer_ticks,
    legend,
    marked,
    style,
    subtitle,
)
from errata.jobs.locating.locate import KnowledgeNeurons
from errata.jobs.locating.problems import Problems
from errata.jobs.locating.regressions import PREDICTORS, table
from errata.jobs.locating.versus import Versus
from errata.locate.saliency import Saliency
from errata.measure.metrics import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "score": "rewrite score",
    "state": "tracing effect, state",
    "mlp": "tracing effect, MLPs",
    "saliency": "saliency",
}
"""What the quantities of locating against editing are called."""


def saliency_bars(saliency: Saliency) -> Figure:
    """Each layer's saliency, naive and, where there is one, standardised; the largest is dark."""
    profiles = [("mean |gradient|", saliency.layers)]
    if saliency.standardised is not None:
        profiles.append(("standard deviations above neutral text", saliency.standardised))
    with style():
        figure, panels = blank(1.0 + 3.4 * len(profiles), 3.2, len(profiles))
        for axes, (name, values) in zip(panels, profiles, strict=True):
            best = max(range(len(values)), key=values.__getitem__)
            colours = [COLOURS[0] if layer == best else "#a9c8de" for layer in range(len(values))]
            axes.bar(range(len(values)), values, 0.8, color=colours)
            axes.annotate(
                f"{values[best]:.2g}",
                (best, values[best]),
                (0, 3 if values[best] >= 0 else -11),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
            axes.margins(y=0.12)
            axes.axhline(0, color=SOFT, lw=0.8)
            axes.grid(axis="y")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            layer_ticks(axes, len(values))
            subtitle(axes, name)
            axes.set_xlabel("layer")
        said = f"{saliency.model}, {counted(saliency.examples, 'example')}"
        if saliency.neutral:
            said += f" against {saliency.neutral} neutral ones"
        head(figure, "Which layers answer for these examples", said)
    return figure


def neuron_scatter(found: KnowledgeNeurons) -> Figure:
    """Knowledge neurons by layer and index, larger for a higher attribution; by fact."""
    alone = len(found.facts) == 1
    top = max([abs(n.score) for fact in found.facts for n in fact.neurons], default=1.0)
    with style():
        figure, (axes,) = blank(7.6, 4.2)
        for number, fact in enumerate(found.facts):
            shift = 0.7 * ((number + 0.5) / len(found.facts) - 0.5)  # beside one another
            axes.scatter(
                [n.layer + shift for n in fact.neurons],
                [n.index for n in fact.neurons],
                s=[12 + 70 * abs(n.score) / top for n in fact.neurons],
                alpha=0.8,
                linewidths=0,
                label=clipped(fact.request.text, 34),
                **marked(number),
            )
            for n in fact.neurons if alone else ():
                axes.annotate(
                    str(n.index),
                    (n.layer, n.index),
                    (9, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axes.grid()
        layer_ticks(axes, found.layers)
        axes.set_xlim(-0.6, found.layers - 0.4)
        axes.set_ylim(-0.03 * found.width, 1.03 * found.width)
        axes.set_xlabel("layer")
        axes.set_ylabel("neuron")
        if not alone:
            legend(figure, axes)
        name = found.facts[0].request.text if alone else f"{len(found.facts)} facts"
        said = f"{found.model}; larger: a higher attribution"
        head(figure, f"Knowledge neurons: {clipped(name, 60)}", said)
    return figure


def against_edits(versus: Versus) -> Figure:
    """Locating against editing: means by layer, every fact and layer, correlations by layer."""
    x = range(len(versus.layers))
    with style():
        figure, (means, points, correlations) = blank(13.0, 4.0, 3)
        for number, name in enumerate(("score", "state", "mlp")):
            columns = table(versus.facts, name).T
            line = [(float(place), interval(columns[place])) for place in x]
            draw_line(means, line, number, NAMES[name])
        subtitle(means, "mean over facts, by layer")
        effects, scores = table(versus.facts, "mlp"), table(versus.facts, "score")
        for place in x:
            shade = _shade(place, len(versus.layers))
            points.scatter(effects[:, place], scores[:, place], s=16, color=shade, alpha=0.6, lw=0)
            middle = (effects[:, place].mean(), scores[:, place].mean())
            points.annotate(
                str(versus.layers[place]),
                middle,
                ha="center",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "circle,pad=0.25", "fc": "white", "ec": shade, "lw": 1.2},
            )
        subtitle(points, "each fact in each layer; a layer's number stands at its mean")
        points.set_xlabel(NAMES["mlp"])
        points.set_ylabel(NAMES["score"])
        points.grid()
        for number, predictor in enumerate(PREDICTORS, 1):
            line = [
                (float(versus.layers.index(c.layer)), c.r)
                for c in versus.correlations
                if c.predictor == predictor
            ]
            draw_line(correlations, line, number, NAMES[predictor])
        correlations.set_ylim(-1.05, 1.05)
        correlations.axhline(0, color=SOFT, lw=0.8)
        subtitle(correlations, "correlation with the rewrite score")
        named = {
            name: line
            for axes in (means, correlations)
            for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            named.values(), named.keys(), loc="outside lower right", ncols=4, handlelength=2.6
        )
        for axes in (means, correlations):
            axes.grid(axis="y")
            axes.set_xlabel("layer")
            axes.set_xticks(x, map(str, versus.layers))
        head(
            figure,
            "Does locating a fact tell where to edit it?",
            f"{versus.model}, {versus.method}, {counted(len(versus.facts), 'fact')}; 95% bands",
        )
    return figure


def problem_lines(problems: Problems) -> Figure:
    """The rewrite score by layer, a panel for each method and a line for each problem."""
    methods = list(dict.fromkeys(study.method for study in problems.studies))
    with style():
        figure, panels = blank(1.2 + 3.9 * (len(methods) + 1), 3.8, len(methods) + 1)
        for axes, method in zip(panels, methods, strict=False):
            mine = [study for study in problems.studies if study.method == method]
            for number, study in enumerate(mine):
                columns = table(study.facts, "score").T
                line = [(float(at), interval(column)) for at, column in enumerate(columns)]
                draw_line(axes, line, number, study.variant)
            subtitle(axes, f"{method}: rewrite score")
            axes.set_ylim(-0.03, 1.03)
        widest = max(problems.studies, key=lambda study: len(study.facts))
        for number, name in enumerate(("state", "mlp"), 5):
            columns = table(widest.facts, name).T
            line = [(float(at), interval(column)) for at, column in enumerate(columns)]
            draw_line(panels[-1], line, number, NAMES[name])
        subtitle(panels[-1], "tracing")
        for axes in panels:
            axes.grid(axis="y")
            axes.set_xlabel("layer")
            axes.set_xticks(range(len(widest.layers)), map(str, widest.layers))
        named = {
            name: line
            for axes in (panels[0], panels[-1])
            for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            named.values(), named.keys(), loc="outside lower right", ncols=7, handlelength=2.2
        )
        head(
            figure,
            "Five editing problems, layer by layer",
            f"{problems.model}, {counted(len(widest.facts), 'fact')} at most; 95% bands",
        )
    return figure


def _shade(place: int, count: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    red, green, blue, alpha = colormaps["viridis"](0.9 * place / max(1, count - 1))
    return red, green, blue, alpha
