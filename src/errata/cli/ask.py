"""`errata ask`: let a model write, before and after, side by side."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from errata.cli import console, options


@click.command(short_help="Let a model write, before and after.")
@click.argument("prompts", nargs=-1, required=True)
@click.option(
    "-e",
    "--edit",
    "files",
    multiple=True,
    type=options.EXISTING_FILE,
    help="An edit file; several are applied in order.",
)
@options.model_option(default=None)
@click.option("-t", "--tokens", default=40, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--sample",
    default=0,
    metavar="K",
    type=click.IntRange(min=0),
    help="Sample among the K likeliest tokens instead of always taking the likeliest.",
)
@click.option("--seed", default=0, show_default=True, help="Of the sampling.")
def ask(
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    model: str | None,
    dtype: str | None,
    device: str | None,
    tokens: int,
    sample: int,
    seed: int,
) -> None:
    """Let the model write on from each of the PROMPTS, without and with an edit."""
    from errata.jobs.ask import ask as job
    from errata.jobs.models import as_model
    from errata.jobs.ship import load_all, model_for

    edit = load_all(files) if files else None
    name = model or (model_for(edit, None) if edit else "pocket")
    with console.progress() as bars:
        bars("loading the model", 0, 1)
        lm = as_model(name, dtype=dtype, device=device)
        bars("loading the model", 1, 1)
        answers = job(lm, prompts, edit, new_tokens=tokens, top_k=sample, seed=seed)
    terminal = console.out()
    for answer in answers:
        terminal.print()
        terminal.print(Text(answer.prompt, "bold"))
        if answer.after is None:
            terminal.print(Text(answer.before.strip()))
            continue
        table = Table(
            box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True, header_style="dim"
        )
        table.add_column("before", ratio=1, overflow="fold")
        table.add_column("after", ratio=1, overflow="fold")
        table.add_row(Text(answer.before.strip()), Text(answer.after.strip()))
        terminal.print(table)
    if files:
        console.next_command("errata score " + " ".join(map(str, files)))
    else:
        console.next_command(
            f'errata edit -m {name} --subject SUBJECT --prompt "... {{}} ..." --target TARGET'
        )
