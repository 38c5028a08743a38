"""`python -m errata.cli.reference FILE`: the reference, from the commands' own help."""

from __future__ import annotations

from pathlib import Path

import click

from errata.cli.main import main

HEADER = """# Command line

This page is written by `make docs` from the help of each command; a test holds it up to date.
"""


def reference() -> str:
    """The page as Markdown."""
    parts = [HEADER, _block("errata", main)]
    for name, command in main.commands.items():
        parts.append(f"## errata {name}\n\n{_block(f'errata {name}', command)}")
    return "\n".join(parts)


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
