"""`errata locate`: where does a model keep facts?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.text import Text

from errata.cli import console, options, tables

if TYPE_CHECKING:
    from errata.jobs.locating.locate import Skipped

F = TypeVar("F", bound=Callable[..., Any])


@click.group(short_help="Where does a model keep facts?")
def locate() -> None:
    """Ask a model where it keeps facts; nothing is changed.

    Without facts, the pocket models are asked for some that many readers know.
    """


def _inputs_and_outputs(name: str) -> Callable[[F], F]:
    """Facts, model, `-o`, `--figure` and `--report`: what all these commands share."""

    def decorate(command: F) -> F:
        for option in (
            click.option(
                "--report",
                type=options.FILE,
                help="The page; OUT with .html unless told otherwise.",
            ),
            click.option("--figure", type=options.FILE, help="A picture, .png or .svg."),
            click.option(
                "-o",
                "--out",
                default=Path(f"{name}.json"),
                show_default=True,
                type=options.FILE,
                help="All numbers, as JSON.",
            ),
            options.model_option(),
            options.fact_options,
        ):
            command = option(command)
        return command

    return decorate


@locate.command(short_help="Which states carry a fact? Hide, restore, compare.")
@click.option(
    "--window",
    type=click.IntRange(min=1),
    help="Layers whose MLPs or attentions are restored at once. By default 10 where there are 28 "
    "layers or more, fewer in proportion.",
)
@click.option(
    "--severed",
    type=click.Choice(["mlp", "attention"]),
    help="Restore states while these stay as in the corrupted run.",
)
@click.option(
    "--noise",
    default=3.0,
    show_default=True,
    help="Size of the noise that hides the subject, in standard deviations of embeddings.",
)
@click.option("--samples", default=10, show_default=True, help="Draws of noise.")
@_inputs_and_outputs("tracing")
def tracing(window: int | None, severed: Any, noise: float, samples: int, **shared: Any) -> None:
    """Causal tracing: hide the subject, put one part of the clean run back, see what returns.

    FACTS is a file of JSON lines, as for `errata edit`. A fact by hand needs --subject and
    --prompt; --true is the answer to look for. What the model does not know is left out.
    """
    from errata.jobs.locating import locate as job
    from errata.jobs.locating.report import by_fact, strongest

    size = job.Noise(scale=noise, samples=samples)
    work = partial(job.tracing, window=window, severed=severed, noise=size)
    result = _located(work, **shared)
    facts = by_fact(result)
    terminal = console.out()
    if len(facts) == 1:
        first = result.traces[0]
        terminal.print(Text(f"{first.request.text} -> {first.answer.strip()}", "bold"))
    else:
        terminal.print(f"{tables.counted(len(facts), 'fact')}; 95% intervals in brackets")
    clean, corrupted = job.total_effect(result)
    terminal.print(f"P is {clean:.2f}; {corrupted:.2f} is left where noise hides the subject.")
    terminal.print()
    found = tables.plain("restored", "token", "best layer", "brings back")
    for row in strongest(result):
        found.add_row(*map(Text, row))
    terminal.print(found)
    _close(result.skipped, "auto:tracing", shared)


@locate.command(short_help="Which layers have large gradients for an edit?")
@click.option(
    "--neutral",
    type=options.EXISTING_FILE,
    help="Ordinary facts to compare with, in any format of FACTS and --cases. The pocket models "
    "bring some.",
)
@click.option(
    "--modules",
    default="mlp",
    show_default=True,
    type=click.Choice(["mlp", "all"]),
    help="Which matrices of each block count; all: attention's last one too.",
)
@_inputs_and_outputs("saliency")
def saliency(neutral: Path | None, modules: Any, **shared: Any) -> None:
    """Gradient saliency: how much each layer would have to answer for, were the facts edited.

    FACTS is a file of JSON lines, as for `errata edit`; the loss is that of their targets.
    """
    from errata.jobs.locating import locate as job

    result = _located(partial(job.salient, neutral=neutral, modules=modules), **shared)
    terminal = console.out()
    compared = f", compared with {result.neutral} neutral ones" if result.neutral else ""
    terminal.print(f"{tables.counted(result.examples, 'fact')}{compared}")
    terminal.print()
    found = tables.plain("layer", "mean |gradient|", "standardised", "")
    standardised = result.standardised
    best = result.best(standardised=standardised is not None)[0]
    for layer, naive in enumerate(result.layers):
        cell = f"{standardised[layer]:.2f}" if standardised else "\N{EN DASH}"
        mark = "the most salient" if layer == best else ""
        found.add_row(str(layer), f"{naive:.3g}", cell, Text(mark, "bold"))
    terminal.print(found)
    _close((), "auto:saliency", shared)


@locate.command(short_help="Which MLP neurons hold a fact?")
@click.option(
    "--factor",
    default=2.0,
    show_default=True,
    help="By which neurons are amplified in the check.",
)
@_inputs_and_outputs("neurons")
def neurons(factor: float, **shared: Any) -> None:
    """Knowledge neurons: those that the answer's probability is attributed to.

    They are found with the fact's prompt and paraphrases, then silenced and amplified: the fact
    should become less and more likely, and other facts stay.
    """
    from errata.jobs.locating import locate as job
    from errata.jobs.locating.report import reactions

    result = _located(partial(job.neurons, factor=factor), facts_by_default=3, **shared)
    terminal = console.out()
    for fact in result.facts:
        answer = fact.neurons.answer.strip()
        terminal.print(Text(f"{fact.request.text} -> {answer}", "bold"))
        names = ", ".join(f"{n.layer}/{n.index} ({n.score:.2f})" for n in fact.neurons)
        terminal.print(f"layer/neuron (attribution): {names or 'none'}")
        found = tables.plain("mean probability of", "as it is", "silent", f"times {factor:g}")
        for row in reactions(fact.effect):
            found.add_row(*row)
        terminal.print(found)
        terminal.print()
    _close(result.skipped, None, shared)


@locate.command(short_help="Does locating tell where to edit?")
@options.method_options("rome", layers_help="Only these layers, such as 0-7 or 0,4,8.")
@click.option("--variant", help="Pose the known facts as this problem, such as fact-erasure.")
@_inputs_and_outputs("versus")
def versus(
    method: str,
    layers: str | None,
    pairs: tuple[str, ...],
    corpus: str | None,
    variant: str | None,
    **shared: Any,
) -> None:
    """Locating against editing: trace each fact, edit it in each layer, correlate.

    Takes minutes: every fact is edited once in every layer. By default, 30 of the pocket facts.
    """
    from errata.jobs.locating import versus as job
    from errata.jobs.locating.report import versus_rows

    work = partial(
        job.versus,
        method=method,
        settings=options.settings(pairs),
        layers=options.layers(layers),
        variant=variant,
        corpus=corpus,
    )
    result = _located(work, facts_by_default=30, **shared)
    terminal = console.out()
    terminal.print(
        f"{tables.counted(len(result.facts), 'fact')}, each edited by {method} in each layer "
        "alone; 95% intervals in brackets"
    )
    for title, columns, rows in versus_rows(result):
        terminal.print()
        terminal.print(Text(title, "bold"))
        found = tables.plain(*columns)
        for row in rows:
            found.add_row(*row)
        terminal.print(found)
    _close(result.skipped, None, shared)


@locate.command(short_help="Five editing problems in every layer, beside tracing.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("ft", "rome", "memit"),
    show_default=True,
    help="May be repeated.",
)
@click.option(
    "--variant", "variants", multiple=True, help="Only this problem. May be repeated; all five."
)
@click.option("--layers", help="Only these layers, such as 0-7 or 0,4,8.")
@click.option(
    "--set",
    "pairs",
    metavar="METHOD.KEY=VALUE",
    multiple=True,
    help="One of a method's numbers, such as rome.target.updates=20. May be repeated.",
)
@click.option("--cases", default="pocket", show_default=True, help="As for `errata edit`.")
@click.option(
    "-n", "--count", default=10, show_default=True, type=click.IntRange(min=1), help="Of each seed."
)
@click.option("--seeds", default="0", show_default=True, help="Such as 0-2 or 0,1,2.")
@click.option("--corpus", metavar="TEXT", help="Ordinary text for the second moments.")
@click.option(
    "--folder",
    type=options.FOLDER,
    help="Where finished parts are kept; OUT with .parts unless told otherwise.",
)
@options.model_option()
@click.option("-o", "--out", default=Path("variants.json"), show_default=True, type=options.FILE)
@click.option("--figure", type=options.FILE, help="A picture, .png or .svg.")
@click.option(
    "--report", type=options.FILE, help="The page; OUT with .html by default, .md for Markdown."
)
def variants(
    methods: tuple[str, ...],
    variants: tuple[str, ...],
    layers: str | None,
    pairs: tuple[str, ...],
    cases: str,
    count: int,
    seeds: str,
    corpus: str | None,
    folder: Path | None,
    model: str,
    dtype: str | None,
    device: str | None,
    out: Path,
    figure: Path | None,
    report: Path | None,
) -> None:
    """Five editing problems, by several methods in every layer, beside what tracing says.

    Error injection, tracing reversal, fact erasure, amplification and forcing, as Hase et al. pose
    them, of facts that the model knows. Takes long; what is finished is kept, and a run that was
    cut short goes on.
    """
    from errata.jobs.locating.problem_tables import problem_rows
    from errata.jobs.locating.problems import problems
    from errata.jobs.locating.report import Places
    from errata.jobs.methods import nested
    from errata.jobs.models import as_model

    places = Places(out, figure, report or out.with_suffix(".html"))
    places.check()
    with console.progress() as bars:
        result = problems(
            as_model(model, dtype=dtype, device=device),
            cases,
            methods=methods,
            variants=variants,
            settings=nested(options.settings(pairs)),
            layers=options.layers(layers),
            count=count,
            seeds=options.layers(seeds) or (0,),
            folder=folder or out.with_suffix(".parts"),
            corpus=corpus,
            progress=bars,
        )
        places.write(result)
    terminal = console.out()
    terminal.print("Each fact edited in each layer alone; 95% intervals in brackets")
    for title, columns, rows in problem_rows(result):
        terminal.print()
        terminal.print(Text(title, "bold"))
        found = tables.plain(*columns)
        for row in rows:
            found.add_row(*row)
        terminal.print(found)
    _close(result.skipped, None, {"out": out, "report": report, "figure": figure, "model": model})


def _located(
    work: Callable[..., Any],
    *,
    facts: Path | None,
    cases: str | None,
    count: int | None,
    subject: str | None,
    prompt: str | None,
    target: str | None,
    true: str | None,
    model: str,
    dtype: str | None,
    device: str | None,
    out: Path,
    figure: Path | None,
    report: Path | None,
    facts_by_default: int = 6,
) -> Any:
    """What `work(lm, cases, progress=...)` finds, saved and drawn."""
    options.check_facts(facts, cases, {"subject": subject, "prompt": prompt}, needed=False)
    if subject is None and (target is not None or true is not None):
        raise click.UsageError("--target and --true belong to a fact by hand: give --subject too.")
    from errata.jobs.locating.locate import facts_for
    from errata.jobs.locating.report import Places
    from errata.jobs.models import as_model

    places = Places(out, figure, report or out.with_suffix(".html"))
    places.check()
    with console.progress() as bars:
        bars("loading the model", 0, 1)
        lm = as_model(model, dtype=dtype, device=device)
        bars("loading the model", 1, 1)
        wanted = facts_for(
            lm,
            facts or cases,
            count,
            by_default=facts_by_default,
            subject=subject,
            prompt=prompt,
            target=target,
            true=true,
        )
        result = work(lm, wanted, progress=bars)
        places.write(result)
    return result


def _close(skipped: Sequence[Skipped], layers: str | None, shared: dict[str, Any]) -> None:
    """Say what was left out, where everything is, and what to try now."""
    terminal = console.out()
    terminal.print()
    for one in skipped[:3]:
        terminal.print(Text(f"left out: {one.why}", "yellow"))
    if len(skipped) > 3:
        terminal.print(f"{len(skipped)} facts were left out; the report names all.")
    out = shared["out"]
    written = [out, shared["report"] or out.with_suffix(".html"), shared["figure"]]
    terminal.print(f"Written -> {', '.join(str(path) for path in written if path)}", soft_wrap=True)
    place = f" -m {shared['model']}"
    if layers is None:
        console.next_command(f"errata locate tracing{place}")
    elif shared["subject"] is not None:
        fact = f'--subject "{shared["subject"]}" --prompt "{shared["prompt"]}"'
        console.next_command(f"errata edit{place} {fact} --target TARGET --layers {layers}")
    else:
        source = shared["facts"] or f"--cases {shared['cases'] or 'pocket'} -n 10"
        console.next_command(f"errata edit {source}{place} --layers {layers}")
