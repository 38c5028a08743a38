"""`errata edit`: the main command."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from errata.cli import console, options


@click.command(short_help="Make a model say facts; prove it; save it.")
@click.argument("facts", required=False, type=options.EXISTING_FILE)
@click.option("--subject", help="Instead of a file: whom or what the fact is about.")
@click.option("--prompt", help="The statement up to its object, {} where the subject stands.")
@click.option("--target", help="What the model should say next.")
@click.option("--true", "true", help="What it says today; scores compare with it.")
@click.option(
    "--cases",
    metavar="SOURCE",
    help="Instead of FACTS: facts that bring their own checks. `pocket`, or a file in "
    "CounterFact's or zsRE's published format.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="Only the first so many facts.")
@options.model_option()
@options.method_options("memit")
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
    by_hand = [value for value in (subject, prompt, target) if value is not None]
    if by_hand and len(by_hand) < 3:
        raise click.UsageError("a fact by hand needs all of --subject, --prompt and --target.")
    if bool(facts) + bool(by_hand) + bool(cases) != 1:
        raise click.UsageError(
            "give the facts in one way: a file FACTS, or --subject, --prompt and --target, or "
            "--cases."
        )
    settings = options.settings(pairs)
    if (chosen := options.layers(layers)) is not None:
        settings["layers"] = chosen
    if keep_going:
        settings["keep_going"] = True

    from errata.cli import tables
    from errata.jobs.cases import one_case, read_cases
    from errata.jobs.edit import run
    from errata.jobs.models import as_model
    from errata.jobs.report import LABELS, counts, size_text

    if subject is not None and prompt is not None and target is not None:
        wanted = [one_case(subject, prompt, target, true)]
    else:
        wanted = read_cases(facts or cases or "", count)
    page = report or out.with_suffix(".html")
    with console.progress() as bars:
        result = run(
            as_model(model, dtype=dtype, device=device),
            wanted,
            method=method,
            settings=settings,
            corpus=corpus,
            scored=score,
            generation=generation,
            out=out,
            report=page,
            progress=bars,
        )
    terminal = console.out()
    shown = result.facts[:8]
    tables.show_facts(terminal, shown)
    if len(result.edit.requests) > len(shown):
        terminal.print(f"\n... and {len(result.edit.requests) - len(shown)} more in the report.")
    terminal.print()
    for kind, (right, total) in counts(result.facts).items():
        terminal.print(f"  {right:>3} of {total:<3} {LABELS[kind]}")
    if result.scores:
        terminal.print()
        tables.show_scores(terminal, ("before", "after"), result.scores, everything=all_scores)
    for request in result.left_out:
        line = f"left out: {request.text} [{request.target.strip()}]"
        terminal.print(Text(line, "yellow"))
    terminal.print()
    facts_done = tables.counted(len(result.edit.requests), "fact")
    terminal.print(f"{facts_done}, {size_text(result.file_bytes)} -> {result.file}", soft_wrap=True)
    terminal.print(f"Report -> {result.report}", soft_wrap=True)
    first = result.edit.requests[0]
    console.next_command(
        f'errata ask "{first.text}" --edit {result.file}',
        f"errata apply {result.file} -o edited-model",
    )
