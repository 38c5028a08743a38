"""The command line: `errata COMMAND`. One file per command; this one lists them."""

from __future__ import annotations

import logging
from typing import Any

import click
from rich.logging import RichHandler

import errata
from errata.cli import console
from errata.cli.apply import apply
from errata.cli.ask import ask
from errata.cli.demo import demo
from errata.cli.diff import diff
from errata.cli.edit import edit
from errata.cli.fit import fit
from errata.cli.grow import grow
from errata.cli.locate import locate
from errata.cli.make_edits import make_edits
from errata.cli.methods import methods
from errata.cli.models import models
from errata.cli.moments import moments
from errata.cli.report import report
from errata.cli.results import results
from errata.cli.run import run
from errata.cli.score import score
from errata.cli.show import show
from errata.cli.trial import trial
from errata.errors import ErrataError


class FriendlyErrors(click.Group):
    """Shows our own errors as one message; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ErrataError as error:
            raise click.ClickException(str(error)) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer meets them."""
        return list(self.commands)


@click.group(cls=FriendlyErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(errata.__version__, package_name="errata", prog_name="errata")
@click.option("-v", "--verbose", count=True, help="Say more: -v what is done, -vv every detail.")
def main(verbose: int) -> None:
    """Correct facts in a language model, prove it, and keep the change as a small file.

    Begin with `errata demo`. Every command ends with the next one to try.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = RichHandler(console=console.errors(), show_path=False, show_time=verbose > 1)
    if not verbose:
        handler.addFilter(console.FewAlike())
    logger = logging.getLogger("errata")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    console.quiet_libraries()


for command in (
    demo,
    edit,
    locate,
    fit,
    make_edits,
    show,
    ask,
    score,
    trial,
    run,
    results,
    report,
    apply,
    diff,
    moments,
    grow,
    models,
    methods,
):
    main.add_command(command)
