"""`errata fit`: editors that must learn first."""

from __future__ import annotations

from pathlib import Path

import click

from errata.cli import console, options


@click.command(short_help="Fit a learnt editor (MEND, SaLEM, ...) to a model.")
@click.argument("method")
@options.model_option()
@click.option(
    "--data",
    default="pocket",
    show_default=True,
    metavar="SOURCE",
    help="Cases to learn from: `pocket`, JSON lines, or a published data set.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="Only the first so many cases.")
@click.option("--layers", help=options.EDITED)
@click.option("--steps", type=click.IntRange(min=1), help="At most so many steps of training.")
@click.option(
    "--set",
    "pairs",
    metavar="KEY=VALUE",
    multiple=True,
    help="One of the method's numbers, such as training.patience=500. May be repeated.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Of the fit, and of the cases kept to validate."
)
@click.option("--resume", is_flag=True, help="Go on with a fit that was stopped; make more steps.")
@click.option(
    "-o", "--out", type=options.FILE, help="The editor's file.  [default: METHOD.safetensors]"
)
def fit(
    method: str,
    model: str,
    dtype: str | None,
    device: str | None,
    data: str,
    count: int | None,
    layers: str | None,
    steps: int | None,
    pairs: tuple[str, ...],
    seed: int,
    resume: bool,
    out: Path | None,
) -> None:
    """Fit the editor of a METHOD that must learn first to a model, and say how well it edits.

    Nine in ten of the cases are learnt from; the others say when to stop and how good it is.
    """
    settings = options.settings(pairs)
    if (chosen := options.edited_layers(layers)) is not None:
        settings["layers"] = chosen
    if steps is not None:
        settings["training.steps"] = steps

    from errata.cli import tables
    from errata.jobs.cases import read_cases
    from errata.jobs.fit import fit as job
    from errata.jobs.models import as_model
    from errata.jobs.report import size_text

    with console.progress() as bars:
        result = job(
            as_model(model, dtype=dtype, device=device),
            read_cases(data, count),
            method=method,
            settings=settings,
            seed=seed,
            out=out or Path(f"{method}.safetensors"),
            resume=resume,
            progress=bars,
        )
    terminal = console.out()
    told = result.training
    blocks = ", ".join(map(str, result.editor.config.layers))
    terminal.print(
        f"{method} on {model}, blocks {blocks}: learnt from "
        f"{tables.counted(len(result.cases.train), 'case')} in {told['steps']} steps "
        f"({result.seconds['fitting']:.0f} s)"
    )
    terminal.print(told["stopped"], style="dim")
    terminal.print()
    names = [name for name in told["validations"][-1] if name != "step"]
    table = tables.plain("validated at step", *names)
    for found in result.curve():
        mark = " *" if found["step"] == told["best"] else ""
        table.add_row(f"{found['step']:.0f}{mark}", *(f"{found[name]:.4f}" for name in names))
    terminal.print(table)
    terminal.print()
    held_back = tables.counted(len(result.cases.validation), "case")
    tables.show_scores(terminal, (f"{held_back} not learnt from",), result.lines, everything=True)
    terminal.print()
    terminal.print(f"The editor, {size_text(result.file_bytes)} -> {result.file}", soft_wrap=True)
    terminal.print(
        f"Checkpoints -> {result.checkpoints}: more steps with --steps and --resume, or delete it.",
        soft_wrap=True,
    )
    where = "" if model == "pocket" else f" -m {model}"
    console.next_command(
        f"errata trial --editor {result.file}{where} --data {data} -n 100",
        f"errata edit FACTS --editor {result.file}{where}",
    )
