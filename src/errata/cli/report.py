"""`errata report`: what an experiment has shown, as a page."""

from __future__ import annotations

from pathlib import Path

import click

from errata.cli import console, options


@click.command(short_help="Write the report of an experiment: tables, figures, claims.")
@click.argument("name")
@click.option(
    "--folder",
    default=Path("results"),
    show_default=True,
    type=options.FOLDER,
    help="Where results are kept.",
)
@click.option("-o", "--out", type=options.FILE, help="The page; FOLDER/NAME.html unless told.")
def report(name: str, folder: Path, out: Path | None) -> None:
    """Write what the experiment NAME has shown so far: a page, and beside it Markdown and figures.

    What is not computed yet is told as such.
    """
    from errata.jobs.studies.report import save_study_report
    from errata.jobs.studies.results import read_results

    results = read_results(name, folder)
    path = out or folder / f"{results.experiment.name}.html"
    page, text = save_study_report(results, path)
    terminal = console.out()
    done = sum(row.status == "done" for row in results.rows)
    terminal.print(f"{done} of {len(results.runs)} runs are done.")
    terminal.print(f"Page -> {page}", soft_wrap=True)
    terminal.print(f"Markdown -> {text}", soft_wrap=True)
    console.next_command(
        f"errata results {name}" if done == len(results.runs) else f"errata run {name}"
    )
