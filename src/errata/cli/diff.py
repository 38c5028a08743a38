"""`errata diff`: how do two edit files differ?"""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from errata.cli import console, options


@click.command(short_help="How do two edit files differ?")
@click.argument("a", type=options.EXISTING_FILE)
@click.argument("b", type=options.EXISTING_FILE)
def diff(a: Path, b: Path) -> None:
    """Compare the edit files A and B: facts, layers, size and direction of the change."""
    from errata.cli import tables
    from errata.jobs.ship import compare

    found = compare(a, b)
    terminal = console.out()
    terminal.print(f"A is {a}\nB is {b}", soft_wrap=True)
    terminal.print(f"In both: {tables.counted(found.shared, 'fact')}.")
    if found.facts:
        terminal.print()
        facts = tables.plain("where", "prompt", "target")
        for row in found.facts:
            facts.add_row(*map(Text, row))
        terminal.print(facts)
    terminal.print()
    layers = tables.plain(*found.headings)
    for row in found.layers:
        layers.add_row(*map(Text, row))
    terminal.print(layers)
    console.next_command(f"errata score {a} {b}", f"errata score {a} {b} --stack")
