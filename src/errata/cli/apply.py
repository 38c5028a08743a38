"""`errata apply`: put edits into a model for good."""

from __future__ import annotations

from pathlib import Path

import click

from errata.cli import console, options


@click.command(short_help="Write a full model folder, or a LoRA.")
@click.argument("edits", nargs=-1, required=True, type=options.EXISTING_FILE)
@options.model_option(default=None)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
@click.option("--lora", is_flag=True, help="Write a PEFT LoRA adapter instead of the whole model.")
@click.option(
    "--force", is_flag=True, help="Apply even to another model than the edit was made for."
)
def apply(
    edits: tuple[Path, ...],
    model: str | None,
    dtype: str | None,
    device: str | None,
    out: Path,
    lora: bool,
    force: bool,
) -> None:
    """Write a complete model folder with the EDITS in its weights, in order."""
    from errata.cli import tables
    from errata.jobs import ship
    from errata.jobs.models import as_model

    name = ship.model_for(ship.load_all(edits), model)
    with console.progress() as bars:
        lm = as_model(name, dtype=dtype, device=device)
        if lora:
            ship.lora(lm, edits, out)
        else:
            ship.apply(lm, edits, out, force=force, progress=bars)
    terminal = console.out()
    what = "LoRA adapter" if lora else "model"
    terminal.print(
        f"The {what} with {tables.counted(len(edits), 'edit')} is in {out}", soft_wrap=True
    )
    if lora:
        console.next_command(
            "python -c 'from peft import PeftModel; from transformers import AutoModelForCausalLM "
            f'as M; PeftModel.from_pretrained(M.from_pretrained("{name}"), "{out}")\''
        )
    else:
        first = ship.load_all(edits).requests[0]
        console.next_command(f'errata ask "{first.text}" -m {out}')
