"""`errata results`: what an experiment has given so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.table import Table as Grid
from rich.text import Text

from errata.cli import console, options, tables

if TYPE_CHECKING:
    from errata.jobs.studies.differences import Compared
    from errata.jobs.studies.tables import Table


@click.command(short_help="Show, export or compare the results of an experiment.")
@click.argument("name")
@click.option(
    "--folder",
    default=Path("results"),
    show_default=True,
    type=options.FOLDER,
    help="Where results are kept.",
)
@click.option(
    "--where",
    "pairs",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Only these, such as model=pocket or protocol.batch=64. May be given often.",
)
@click.option("--metrics", metavar="NAMES", help="Which, such as ES,PS; the main ones otherwise.")
@click.option(
    "--compare",
    "labels",
    nargs=2,
    metavar="EDITOR EDITOR",
    help="Test the difference of two editors, case by case.",
)
@click.option("--export", type=options.FILE, help="Write to a .csv, .jsonl or .parquet file.")
@click.option(
    "--lines",
    type=click.Choice(["units", "cases", "points"]),
    default="units",
    show_default=True,
    help="What a line of an exported .csv or .parquet is.",
)
def results(
    name: str,
    folder: Path,
    pairs: tuple[str, ...],
    metrics: str | None,
    labels: tuple[str, str] | None,
    export: Path | None,
    lines: Literal["units", "cases", "points"],
) -> None:
    """Show the results of the experiment NAME, each with its 95% interval over cases and seeds."""
    from errata.jobs.studies.cells import matching
    from errata.jobs.studies.differences import compared
    from errata.jobs.studies.export import export_rows
    from errata.jobs.studies.results import read_results
    from errata.jobs.studies.tables import overview, tabulate

    found = read_results(name, folder)
    where = options.settings(pairs, option="--where")
    chosen = tuple(metric.strip() for metric in metrics.split(",")) if metrics else ()
    spec = overview(found.runs, chosen, where)
    terminal = console.out()
    terminal.print(Text(found.experiment.title, "bold"))
    terminal.print("95% intervals over cases in brackets; shares times 100")
    terminal.print()
    if labels is not None:
        by = tuple(field for field in spec.rows if field != "editor")
        pairs_of = compared(found.runs, *labels, spec.metrics, by, spec.where)
        terminal.print(_differences(labels, by, pairs_of))
    else:
        terminal.print(numbers(tabulate(spec, found.runs), terminal.width))
    runs = matching(found.runs, where)
    if lacking := sum(run.row is None or run.row.status == "failed" for run in runs):
        terminal.print()
        terminal.print(
            f"{lacking} of {len(runs)} runs have failed or are not done; * stands where they lack."
        )
    if export is not None:
        rows = [run.row for run in runs if run.row is not None]
        terminal.print()
        terminal.print(f"Rows -> {export_rows(rows, export, table=lines)}", soft_wrap=True)
    console.next_command(f"errata report {name}")


def numbers(table: Table, width: int) -> Grid:
    """A line each, or two where the terminal is too narrow for intervals beside their means."""
    from errata.jobs.studies.tables import number_text

    wide = width >= 14 * len(table.fields) + 22 * len(table.metrics)
    gap, dot = (" ", ".") if wide else ("\n", ".\n")
    grid = tables.plain(*table.fields, *(name.replace(".", dot) for name in table.metrics))
    for labels, values in table.lines:
        cells = [_number(*number_text(value), gap) for value in values]
        grid.add_row(*map(Text, labels), *cells)
    for column in grid.columns[len(table.fields) :]:
        column.no_wrap = True
    return grid


def _differences(labels: tuple[str, str], by: Sequence[str], found: Sequence[Compared]) -> Grid:
    from errata.jobs.report import estimate_text
    from errata.jobs.studies.cells import text
    from errata.jobs.studies.tables import heading, scale, scaled

    grid = tables.plain(*map(heading, by), "score", *labels, "difference", "p", "cases")
    for one in found:
        for metric, difference in one.differences.items():
            start = [*map(text, one.place), metric]
            if difference is None:
                grid.add_row(*map(Text, start), *[Text("\N{EN DASH}")] * 5)
                continue
            sides = (f"{scale(metric) * x:.1f}" for x in (difference.first, difference.second))
            grid.add_row(
                *map(Text, [*start, *sides]),
                _number(*estimate_text(scaled(difference.estimate, metric))),
                "" if difference.p is None else f"{difference.p:.2g}",
                str(difference.estimate.n),
            )
    return grid


def _number(mean: str, span: str, gap: str = " ") -> Text:
    return Text.assemble(mean, (gap + span if span else "", "dim"))
