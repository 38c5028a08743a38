"""`errata make-edits`: a classifier, and edits of its own mistakes."""

from __future__ import annotations

from pathlib import Path

import click

from errata.cli import console, options


@click.command("make-edits", short_help="Train a classifier; make edits of its mistakes.")
@click.argument("data")
@click.option("-m", "--model", required=True, help="Any encoder: a folder or a Hub name.")
@click.option("-o", "--out", required=True, type=options.FOLDER, help="Folder for all of it.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="Only so many texts, drawn.")
@click.option("--folds", default=3, show_default=True, type=click.IntRange(min=2))
@click.option(
    "--coin/--mistakes",
    default=None,
    help="Edit what a fair coin flips, or what is mistaken.  [default: the coin for FEVER]",
)
@click.option(
    "--rephraser",
    default="rules",
    show_default=True,
    help="rules, a .jsonl file of `text` and `rephrasings`, or a seq2seq model.",
)
@click.option("--prefix", default="", help="What that model wants before a text.")
@click.option("--encoder", help="Compares rephrasings.  [default: the model]")
@click.option(
    "--similarity",
    default="sentence",
    show_default=True,
    type=click.Choice(["sentence", "bertscore"]),
)
@click.option("--least", default=0.4, show_default=True, help="How alike rephrasings must be.")
@click.option(
    "--set",
    "pairs",
    metavar="KEY=VALUE",
    multiple=True,
    help="Another number, such as classifier.training.steps=200. May be repeated.",
)
@click.option("--seed", default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
def make_edits(
    data: str,
    model: str,
    out: Path,
    count: int | None,
    folds: int,
    coin: bool | None,
    rephraser: str,
    prefix: str,
    encoder: str | None,
    similarity: str,
    least: float,
    pairs: tuple[str, ...],
    seed: int,
    resume: bool,
) -> None:
    """Train classifiers on DATA, texts with labels, and make edits of what they get wrong.

    Each fold of the data is judged by a classifier that has not learnt from it. Its mistakes, with
    rephrasings, become cases; its right answers become their neighbours. A fold's folder is a model
    with `train.jsonl` and `validation.jsonl`.
    """
    settings = options.settings(pairs) | {
        "folds": folds,
        "coin": coin,
        "similarity": similarity,
        "least": least,
        "seed": seed,
    }

    from errata.cli import tables
    from errata.jobs.make_edits import make_edits as job

    with console.progress() as bars:
        made = job(
            data,
            model,
            out,
            settings=settings,
            count=count,
            rephrase=rephraser,
            prefix=prefix,
            encoder=encoder,
            resume=resume,
            progress=bars,
        )
    terminal = console.out()
    table = tables.plain(
        made.data, "instances", "accuracy", "edits", "rephrasings", "dropped", "kept"
    )
    named = [(f"fold {i}", fold) for i, fold in enumerate(made.folds, 1)]
    for name, row in [*named, ("together", made.statistics())]:
        counts = (row.edits, row.adaptive, row.dropped, row.kept)
        table.add_row(name, str(row.instances), f"{row.accuracy:.3f}", *map(str, counts))
    terminal.print(table)
    if made.shortened:
        terminal.print(f"{made.shortened} texts were too long and were cut.", style="dim")
    first = out / "fold-1"
    console.next_command(
        f"errata fit salem -m {first} --data {first}/train.jsonl",
        f"errata trial --method ft -m {first} --data {first}/validation.jsonl",
    )
