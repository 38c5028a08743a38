"""`errata show`: what is in an edit file?"""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from errata.cli import console, options


@click.command(short_help="What is in this edit file?")
@click.argument("file", type=options.EXISTING_FILE)
@click.option("--all", "everything", is_flag=True, help="List every fact, and the whole record.")
@click.option(
    "--routes",
    type=options.FILE,
    help="Draw which expert answers to which edit (of `scen`), as .png or .svg.",
)
def show(file: Path, everything: bool, routes: Path | None) -> None:
    """Say what is in the edit FILE: facts, model, method, size of the change, scores."""
    import json

    from errata.cli import tables
    from errata.jobs.report import size_text
    from errata.jobs.routes import draw_routes
    from errata.jobs.ship import describe

    found = describe(file)
    edit, record = found.edit, found.edit.record
    terminal = console.out()
    made = f", made {record.created}" if record.created else ""
    terminal.print(
        Text.assemble(
            (str(file), "bold"),
            f": {tables.counted(len(edit.requests), 'fact')}, {size_text(found.file_bytes)}{made}",
        ),
        soft_wrap=True,
    )
    terminal.print(Text(f"for {record.model or 'an unnamed model'}, by {record.method or '?'}"))
    terminal.print()
    facts = tables.plain("prompt", "says from now on", "instead of")
    limit = len(edit.requests) if everything else 20
    for request in edit.requests[:limit]:
        facts.add_row(
            Text(request.text),
            Text(request.wish, "bold"),
            Text((request.true or "").strip()),
        )
    terminal.print(facts)
    if len(edit.requests) > limit:
        terminal.print(f"... and {len(edit.requests) - limit} more; --all lists them.")
    terminal.print()
    if found.changes:
        weights = tables.plain("weight", "rank", "norm of the change")
        for change in found.changes:
            weights.add_row(Text(change.path), str(change.rank), f"{change.norm:.4g}")
        terminal.print(weights)
    if found.memories:
        memories = tables.plain("beside", "memory", "entries", "size")
        for part in found.memories:
            memories.add_row(Text(part.path), part.kind, str(part.entries), size_text(part.nbytes))
        terminal.print(memories)
    if routes is not None:
        drawn = draw_routes(edit, routes)
        terminal.print(
            Text(
                f"{drawn.right} of {tables.counted(len(drawn.experts), 'edit')} reach their own "
                f"expert -> {routes}"
            )
        )
    if record.scores:
        terminal.print()
        terminal.print(tables.recorded(record.scores, everything=everything))
    if everything:
        terminal.print()
        terminal.print(Text(json.dumps(record.to_dict(), indent=2, ensure_ascii=False)))
    console.next_command(
        f'errata ask "{edit.requests[0].text}" --edit {file}'
        if edit.requests
        else f"errata apply {file} -o edited-model"
    )
