"""`errata run`: do what an experiment says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from errata.cli import console, options, tables

if TYPE_CHECKING:
    from rich.console import Console

    from errata.jobs.cluster import Where
    from errata.jobs.studies.forecast import Plan


@click.command(short_help="Run an experiment; what is finished is kept.")
@click.argument("name")
@click.option(
    "--on",
    type=click.Choice(["loop", "processes", "ray"]),
    default="loop",
    show_default=True,
    help="Where work is done: here one by one, in processes of this machine, or on Ray.",
)
@click.option("--workers", type=click.IntRange(min=1), help="How many at once.")
@click.option("--address", help="Of a Ray cluster; without it one is started on this machine.")
@click.option("--only", metavar="TEXT", help="Only units with this text in their description.")
@click.option(
    "--folder",
    default=Path("results"),
    show_default=True,
    type=options.FOLDER,
    help="Where results are kept.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done, and what it costs.")
@click.pass_context
def run(
    context: click.Context,
    name: str,
    on: Where,
    workers: int | None,
    address: str | None,
    only: str | None,
    folder: Path,
    dry_run: bool,
) -> None:
    """Run the experiment NAME: experiments/NAME.toml, or a file.

    What is finished already is skipped, so an interrupted run is simply run again.
    """
    from errata.cli.results import numbers
    from errata.jobs.studies import run as studies
    from errata.jobs.studies.experiment import Experiment
    from errata.jobs.studies.results import read_results
    from errata.jobs.studies.tables import overview, tabulate

    experiment = Experiment.load(name)
    terminal = console.out()
    if dry_run:
        from errata.jobs.studies import forecast

        with console.progress() as bars:
            forecast_ = forecast.plan(experiment, folder=folder, only=only, progress=bars)
        _show(terminal, experiment.title, forecast_)
        console.next_command(f"errata run {name}")
        return
    with console.progress() as bars:
        result = studies.run(
            experiment,
            folder=folder,
            on=on,
            workers=workers,
            address=address,
            only=only,
            progress=bars,
        )
    terminal.print(Text(experiment.title, "bold"))
    if result.done + result.skipped + result.adopted:
        runs = read_results(name, folder).runs
        terminal.print(numbers(tabulate(overview(runs), runs), terminal.width))
        terminal.print()
    terminal.print(
        f"{tables.counted(result.done, 'unit')} done in {_duration(result.seconds)}, "
        f"{result.skipped} were there already, {len(result.failed)} failed"
    )
    if result.adopted:
        terminal.print(f"{result.adopted} were computed by another experiment.")
    if result.elsewhere:
        terminal.print(f"{result.elsewhere} are being done by another process.")
    for unit, why in result.failed[:3]:
        terminal.print(Text(f"failed: {unit}: {why}", "yellow"))
    console.next_command(f"errata report {name}", f"errata results {name}")
    if result.failed:
        context.exit(1)


def _show(terminal: Console, title: str, plan: Plan) -> None:
    from errata.jobs.report import size_text

    terminal.print(Text(title, "bold"))
    terminal.print(
        f"{tables.counted(len(plan.units), 'unit')} to do; {plan.finished} are done already."
    )
    if not plan.units:
        return
    table = tables.plain("model", "units", "facts", "edits", "cases scored", "time", "memory", "")
    for cost in plan.costs:
        work = cost.work
        counts = (cost.units, work.facts, work.edits, work.scored)
        table.add_row(
            cost.model,
            *(f"{count:,}" for count in counts),
            _duration(cost.seconds),
            size_text(cost.nbytes),
            cost.how,
        )
    terminal.print(table)
    if plan.fits:
        terminal.print(
            f"{tables.counted(plan.fits, 'editor')} to be fitted first, reckoned with all their "
            "steps; most stop earlier."
        )
    terminal.print(f"About {_duration(plan.seconds)} in one process, one unit after another.")
    if any(cost.how == "estimated" for cost in plan.costs):
        terminal.print(
            Text(
                "Estimated: from the model's shape and this machine's speed, as the model is not "
                "here; good to a factor of two or so.",
                "yellow",
            )
        )
    for data in plan.absent:
        terminal.print(Text(f"{data} is not here: reckoned with cases of pocket.", "yellow"))


def _duration(seconds: float) -> str:
    """Such as `40 s`, `12 min`, `3.4 h`."""
    for size, unit in ((86400.0, "days"), (3600.0, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
