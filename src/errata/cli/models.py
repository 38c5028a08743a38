"""`errata models`: what can be edited?"""

from __future__ import annotations

import click
from rich.text import Text

from errata.cli import console


@click.command(short_help="What can be edited?")
def models() -> None:
    """List the embedded models, the families that errata knows, and the papers' recipes."""
    from errata.cli import tables
    from errata.jobs import models as job
    from errata.jobs.methods import recipes
    from errata.jobs.report import size_text

    terminal = console.out()
    own = tables.plain("embedded model", "weights", "where")
    for pocket in job.pockets():
        size = size_text(pocket.nbytes) if pocket.nbytes else "missing"
        own.add_row(Text(pocket.name, "bold"), size, Text(str(pocket.folder)))
    for name, base in job.tuned().items():
        own.add_row(Text(name, "bold"), "", f"made from {base} when first used")
    terminal.print(own)
    terminal.print()
    terminal.print("Model types that can be edited, from a folder or the Hugging Face Hub:")
    terminal.print(Text("  " + ", ".join(job.families())))
    if known := recipes():
        terminal.print()
        terminal.print("Numbers of the papers, used by themselves for these models:")
        for method, names in known.items():
            terminal.print(Text.assemble((f"  {method}: ", "bold"), ", ".join(names)))
    terminal.print()
    terminal.print("Any other model gets layers and numbers by a relative rule.")
    console.next_command("errata methods")
