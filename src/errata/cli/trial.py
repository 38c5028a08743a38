"""`errata trial`: how well does a method do?"""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from errata.cli import console, options


@click.command(short_help="Measure a method: edit, score, undo, case by case.")
@options.model_option()
@options.method_options("rome")
@options.editor_option
@click.option(
    "--data",
    default="pocket",
    show_default=True,
    metavar="SOURCE",
    help="Cases: `pocket`, JSON lines, or a published data set.",
)
@click.option("-n", "--count", default=200, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--batch",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Facts written at once; every batch starts from the unedited model.",
)
@click.option("--all-scores", is_flag=True, help="Print every score, not only the main ones.")
@click.option("-o", "--out", type=options.FILE, help="A JSON line for each case.")
def trial(
    model: str,
    dtype: str | None,
    device: str | None,
    method: str,
    data: str,
    count: int,
    batch: int,
    layers: str | None,
    pairs: tuple[str, ...],
    corpus: str | None,
    editor: Path | None,
    all_scores: bool,
    out: Path | None,
) -> None:
    """Measure a method on many cases: edit, score, undo, each on the unedited model."""
    from errata.cli import tables
    from errata.jobs.cases import read_cases
    from errata.jobs.models import as_model
    from errata.jobs.trial import trial as run

    options.check_editor(editor, layers=layers, set=pairs, corpus=corpus)
    settings = options.settings(pairs)
    if (chosen := options.edited_layers(layers)) is not None:
        settings["layers"] = chosen
    with console.progress() as bars:
        result = run(
            as_model(model, dtype=dtype, device=device),
            read_cases(data, count),
            method=method,
            settings=settings,
            corpus=corpus,
            fitted=editor,
            batch=batch,
            out=out,
            progress=bars,
        )
    terminal = console.out()
    alone = "each alone" if batch == 1 else f"{batch} at once"
    terminal.print(
        f"{result.method} on {model}: {tables.counted(result.cases, 'case')}, {alone}; "
        "95% intervals in brackets"
    )
    if result.advice:
        terminal.print(result.advice, style="dim")
    for failure in result.failed[:3]:
        terminal.print(Text(failure, "yellow"))
    if result.failed:
        terminal.print(f"{len(result.failed)} edits failed; scored on the unedited model.")
    terminal.print()
    tables.show_scores(terminal, result.names, result.scores, everything=all_scores)
    how = f"--editor {editor}" if editor else f"--method {method}"
    console.next_command(f"errata edit --cases {data} -n 10 {how}")
