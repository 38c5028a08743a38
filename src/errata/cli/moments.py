"""`errata moments`: compute second moments once, for every later edit."""

from __future__ import annotations

import click

from errata.cli import console, options


@click.command(short_help="Compute second moments once, for later.")
@options.model_option()
@click.option("--layers", help="Blocks, such as 5, 3-8 or 1,2,5; those of METHOD by default.")
@click.option("--method", default="memit", show_default=True, help="See `errata methods`.")
@click.option(
    "--corpus",
    metavar="TEXT",
    help="A text file, a folder, JSON lines or hub:NAME. By default the pocket encyclopedia's "
    "statements for the pocket models, and text sampled from the model itself for others.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="How many tokens to read.")
@click.option("--estimate", "only_estimate", is_flag=True, help="Only say what it would cost.")
def moments(
    model: str,
    dtype: str | None,
    device: str | None,
    layers: str | None,
    method: str,
    corpus: str | None,
    tokens: int | None,
    only_estimate: bool,
) -> None:
    """Compute and keep the second moments of a model's keys, all layers in one pass.

    Edits look them up by the hash of the weights and the text; what is there is not computed
    again, and a pass that was stopped goes on where it was.
    """
    from errata.cli import tables
    from errata.jobs import moments as job
    from errata.jobs.models import as_model
    from errata.jobs.report import size_text

    terminal = console.out()
    chosen = options.layers(layers)
    with console.progress() as bars:
        plan = job.plan(
            as_model(model, dtype=dtype, device=device),
            layers=chosen,
            method=method,
            corpus=corpus,
            tokens=tokens,
            progress=bars,
        )
    terminal.print(
        f"Layers {', '.join(map(str, plan.layers))} of {plan.lm.name}, {plan.tokens:,} tokens of "
        f"{plan.corpus_name}: about {plan.seconds:.0f} s and {size_text(plan.nbytes)} of memory."
    )
    if not only_estimate:
        with console.progress() as bars:
            found = job.compute(plan, progress=bars)
        kept = tables.counted(len(found.layers), "moment")
        terminal.print(f"{kept} over {found.tokens:,} tokens: {plan.folder}", soft_wrap=True)
    console.next_command(f"errata edit FACTS -m {model}")
