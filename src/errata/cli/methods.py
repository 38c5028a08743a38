"""`errata methods`: how can it be edited?"""

from __future__ import annotations

import click
from rich.text import Text

from errata.cli import console


@click.command(short_help="How can it be edited?")
@click.argument("method", required=False)
def methods(method: str | None) -> None:
    """List the editing methods, or all settings of one METHOD."""
    from errata.cli import tables
    from errata.jobs import methods as job

    terminal = console.out()
    if method is None:
        table = tables.plain("method", "what it does", "paper")
        for name, entry in job.methods().items():
            table.add_row(Text(name, "bold"), Text(entry.title), Text(entry.paper))
        terminal.print(table)
        console.next_command(f"errata methods {next(iter(job.methods()))}", "errata demo")
        return
    table = tables.plain("setting", "default", "what it is")
    for setting in job.settings(method):
        table.add_row(Text(setting.name, "bold"), Text(setting.default), Text(setting.meaning))
    terminal.print(table)
    console.next_command(f"errata edit FACTS --method {method} --set KEY=VALUE")
