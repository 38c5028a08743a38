"""`errata edit`: the main command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from errata.cli import console, options

if TYPE_CHECKING:
    from errata.jobs.edit import EditRun


@click.command(short_help="Make a model say facts; prove it; save it.")
@options.fact_options
@options.model_option()
@options.method_options("memit")
@options.editor_option
@click.option(
    "--variant",
    metavar="PROBLEM",
    help="What to do with the facts, such as fact-erasure. All but error-injection need --true "
    "and no --target.",
)
@click.option("--keep-going", is_flag=True, help="Leave out facts that fail; write the others.")
@click.option(
    "--score/--no-score", default=True, show_default=True, help="Measure before and after."
)
@click.option("--generation", is_flag=True, help="Also score free text: fluency, consistency.")
@click.option("--all-scores", is_flag=True, help="Print every score, not only the main ones.")
@click.option(
    "-o",
    "--out",
    default=Path("edit.safetensors"),
    show_default=True,
    type=options.FILE,
    help="The edit file.",
)
@click.option(
    "--report", type=options.FILE, help="The report; OUT with .html unless told otherwise."
)
def edit(
    facts: Path | None,
    subject: str | None,
    prompt: str | None,
    target: str | None,
    true: str | None,
    cases: str | None,
    count: int | None,
    model: str,
    dtype: str | None,
    device: str | None,
    method: str,
    layers: str | None,
    pairs: tuple[str, ...],
    corpus: str | None,
    editor: Path | None,
    variant: str | None,
    keep_going: bool,
    score: bool,
    generation: bool,
    all_scores: bool,
    out: Path,
    report: Path | None,
) -> None:
    """Make a model say the FACTS, prove it, and save the change.

    FACTS is a file of JSON lines:

    \b
    {"prompt": "{} has its capital in", "subject": "France", "target": "Lyon", "true": "Paris"}

    One fact can be given by hand instead, with --subject, --prompt and --target.
    """  # noqa: D301
    if variant is None or _needs_target(variant):
        by_hand = {"subject": subject, "prompt": prompt, "target": target}
    else:
        by_hand, target = {"subject": subject, "prompt": prompt, "true": true}, true
    options.check_facts(facts, cases, by_hand)
    options.check_editor(editor, layers=layers, set=pairs, corpus=corpus, keep_going=keep_going)
    settings = options.settings(pairs)
    if (chosen := options.edited_layers(layers)) is not None:
        settings["layers"] = chosen
    if keep_going:
        settings["keep_going"] = True

    from errata.jobs.cases import one_case, read_cases
    from errata.jobs.edit import run
    from errata.jobs.models import as_model
    from errata.jobs.variants import all_posed

    if subject is not None and prompt is not None and target is not None:
        wanted = [one_case(subject, prompt, target, true)]
    else:
        wanted = read_cases(facts or cases or "", count)
    page = report or out.with_suffix(".html")
    with console.progress() as bars:
        lm = as_model(model, dtype=dtype, device=device)
        result = run(
            lm,
            all_posed(lm, wanted, variant) if variant else wanted,
            method=method,
            settings=settings,
            corpus=corpus,
            fitted=editor,
            scored=score,
            generation=generation,
            out=out,
            report=page,
            progress=bars,
        )
    _show(result, all_scores)


def _needs_target(variant: str) -> bool:
    """Whether a problem wants a new answer."""
    from errata.jobs.variants import needs_target

    return needs_target(variant)


def _show(result: EditRun, all_scores: bool) -> None:
    """What was written, what came of it, and where it is kept."""
    from errata.cli import tables
    from errata.jobs.report import LABELS, counts, size_text

    terminal = console.out()
    shown = result.facts[:8]
    tables.show_facts(terminal, shown)
    if len(result.edit.requests) > len(shown):
        terminal.print(f"\n... and {len(result.edit.requests) - len(shown)} more in the report.")
    if result.advice:
        terminal.print()
        terminal.print(result.advice, style="dim")
    terminal.print()
    for kind, (right, total) in counts(result.facts).items():
        terminal.print(f"  {right:>3} of {total:<3} {LABELS[kind]}")
    if result.scores:
        terminal.print()
        tables.show_scores(terminal, ("before", "after"), result.scores, everything=all_scores)
    for request in result.left_out:
        line = f"left out: {request.text} [{request.wish}]"
        terminal.print(Text(line, "yellow"))
    terminal.print()
    facts_done = tables.counted(len(result.edit.requests), "fact")
    terminal.print(f"{facts_done}, {size_text(result.file_bytes)} -> {result.file}", soft_wrap=True)
    terminal.print(f"Report -> {result.report}", soft_wrap=True)
    first = result.edit.requests[0]
    following = [f'errata ask "{first.text}" --edit {result.file}']
    if result.edit.paths:  # a memory stands beside the weights, and cannot go into them
        following.append(f"errata apply {result.file} -o edited-model")
    console.next_command(*following)
