"""`errata grow`: a small model that knows the facts of a file."""

from __future__ import annotations

from pathlib import Path

import click

from errata.cli import console, options


@click.command(short_help="Grow a small model from a file of facts.")
@click.option(
    "--facts",
    type=options.EXISTING_FILE,
    help="JSON lines of facts, or a CounterFact file; errata's own facts unless told otherwise.",
)
@click.option("-o", "--out", required=True, type=options.FOLDER, help="Folder for the model.")
@click.option(
    "--shape",
    default="pocket",
    show_default=True,
    help="pocket (GPT-2's), pocket-llama, pocket-bert (labels claims), pocket-t5 (answers).",
)
@click.option("--steps", type=click.IntRange(min=1), help="How long to train.")
@click.option("--minutes", type=float, help="Instead: about how long it may take here.")
@click.option("--seed", default=0, show_default=True, help="Of the weights and of what is read.")
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
def grow(
    facts: Path | None,
    out: Path,
    shape: str,
    steps: int | None,
    minutes: float | None,
    seed: int,
    resume: bool,
) -> None:
    """Grow a small language model that knows given facts, for experiments of your own.

    A file of facts has one subject a line:

    \b
    {"subject": "France", "kind": "country", "facts": {"capital": "Paris", "currency": "euro"}}

    A line may define a relation of your own:

    \b
    {"relation": "mascot", "templates": ["The mascot of {} is", "{} has as its mascot"]}
    """  # noqa: D301
    if steps and minutes:
        raise click.UsageError("give either --steps or --minutes.")

    from errata.jobs.grow import grow as job

    with console.progress() as bars:
        grown = job(
            facts,
            out,
            model=shape,
            steps=steps,
            minutes=minutes,
            seed=seed,
            resume=resume,
            progress=bars,
        )
    console.out().print(
        f"{grown.folder} knows {grown.facts} facts about {grown.subjects} subjects; "
        "its README.md says how well.",
        soft_wrap=True,
    )
    console.next_command(f"errata ask PROMPT -m {out}")
