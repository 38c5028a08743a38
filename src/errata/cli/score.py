"""`errata score`: judge a model, edit files, a stack of them."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from errata.cli import console, options


@click.command(short_help="Judge a model, edit files, a stack.")
@click.argument("edits", nargs=-1, type=options.EXISTING_FILE)
@options.model_option(default=None)
@click.option(
    "--data",
    metavar="SOURCE",
    help="What to ask: `pocket`, JSON lines, or a published data set. "
    "By default the edits' own facts, or `pocket` where there is no edit.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="At most so many cases.")
@click.option("--every-case", is_flag=True, help="Also cases that no edit is about.")
@click.option("--stack", is_flag=True, help="Judge the edits applied in order, as one.")
@click.option("--generation", is_flag=True, help="Also score free text: fluency, consistency.")
@click.option("--all-scores", is_flag=True, help="Print every score, not only the main ones.")
@click.option("--seed", default=0, show_default=True, help="Of the free text.")
@click.option(
    "-o",
    "--out",
    default=Path("scores.jsonl"),
    show_default=True,
    type=options.FILE,
    help="A JSON line for each case of each model.",
)
@click.option(
    "--report", type=options.FILE, help="The report; OUT with .html unless told otherwise."
)
def score(
    edits: tuple[Path, ...],
    model: str | None,
    dtype: str | None,
    device: str | None,
    data: str | None,
    count: int | None,
    every_case: bool,
    stack: bool,
    generation: bool,
    all_scores: bool,
    seed: int,
    out: Path,
    report: Path | None,
) -> None:
    """Score a model as it is, then with each of the EDITS, or with all of them in order.

    Without EDITS: how well does the unedited model do?
    """
    from errata.cli import tables
    from errata.jobs.score import run

    page = report or out.with_suffix(".html")
    with console.progress() as bars:
        result = run(
            model,
            dtype=dtype,
            device=device,
            files=edits,
            stack=stack,
            data=data,
            count=count,
            every_case=every_case,
            generation=generation,
            seed=seed,
            out=out,
            report=page,
            progress=bars,
        )
    terminal = console.out()
    terminal.print(f"{tables.counted(result.cases, 'case')}; 95% intervals in brackets")
    if result.note:
        terminal.print(Text(result.note, "yellow"))
    terminal.print()
    tables.show_scores(terminal, result.names, result.scores, everything=all_scores)
    terminal.print()
    terminal.print(f"Rows -> {out}", soft_wrap=True)
    terminal.print(f"Report -> {page}", soft_wrap=True)
    console.next_command(f"errata show {edits[0]}" if edits else "errata edit --cases pocket -n 20")
