"""`errata demo`: a handful of facts, from beginning to end."""

from __future__ import annotations

from pathlib import Path

import click

from errata.cli import console, options


@click.command(short_help="Edit facts in the embedded model: see it all.")
@click.option("-n", "--count", default=8, show_default=True, help="How many facts to edit.")
@click.option("-m", "--model", default="pocket", show_default=True, help="pocket or pocket-llama.")
@click.option("--method", default="memit", show_default=True, help="See `errata methods`.")
@click.option(
    "-o",
    "--out",
    default=Path("errata-out"),
    show_default=True,
    type=options.FOLDER,
    help="Folder for the edit file and the report.",
)
def demo(count: int, model: str, method: str, out: Path) -> None:
    """Edit a handful of facts in the embedded model and show what changed.

    Needs no network: the model is part of errata.
    """
    from errata.cli import tables
    from errata.jobs import demo as job
    from errata.jobs.report import LABELS, counts, size_text

    with console.progress() as bars:
        run = job.demo(model, count=count, method=method, out=out, progress=bars)
    terminal = console.out()
    facts = tables.counted(len(run.edit.requests), "fact")
    terminal.print(
        f"[bold]errata[/bold] corrected {facts} in [bold]{model}[/bold] "
        f"with {method}, in {run.seconds['editing']:.0f} s.\n"
        "Each block: the prompt, a paraphrase it was never edited on, a neighbour and another\n"
        "fact of the same subject that must not move. In its own words, before and now:"
    )
    tables.show_facts(terminal, run.facts)
    terminal.print()
    terminal.print(
        "\n".join(
            f"  {right:>3} of {total:<3} {LABELS[kind]}"
            for kind, (right, total) in counts(run.facts).items()
        )
    )
    terminal.print()
    tables.show_scores(terminal, ("before", "after"), run.scores)
    terminal.print()
    terminal.print(f"Edit file  {run.file} ({size_text(run.file_bytes)})", soft_wrap=True)
    terminal.print(f"Report     {run.report}", soft_wrap=True)
    first = run.edit.requests[0]
    console.next_command(
        f'errata ask "{first.text}" --edit {run.file}',
        f"errata show {run.file}",
        'errata edit --subject Italy --prompt "{} has its capital in" --target Vienna',
    )
