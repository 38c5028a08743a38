"""`python -m errata.cli.reference FILE`: the reference, from the commands' own help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from errata.cli.main import main

HEADER = """# Command line

This page is written by `make docs` from the help of each command; a test holds it up to date.
"""


def reference() -> str:
    """The page as Markdown."""
    parts = [HEADER, _block("errata", main)]
    for name, command in _all(main, "errata"):
        parts.append(f"## {name}\n\n{_block(name, command)}")
    return "\n".join(parts)


def _all(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    """Every command of a group by its whole name, groups before what is in them."""
    for name, command in group.commands.items():
        yield f"{prefix} {name}", command
        if isinstance(command, click.Group):
            yield from _all(command, f"{prefix} {name}")


def _block(name: str, command: click.Command) -> str:
    context = click.Context(
        command,
        info_name=name,
        terminal_width=90,
        max_content_width=90,
        help_option_names=["-h", "--help"],
    )
    return f"```text\n{command.get_help(context)}\n```\n"


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def write(file: Path) -> None:
    """Write the reference to FILE."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(reference(), encoding="utf-8")
    click.echo(f"wrote {file}")


if __name__ == "__main__":
    write()
