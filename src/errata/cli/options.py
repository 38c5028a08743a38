"""Options that several commands share, and reading `--set key=value`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

AUTOMATIC = ("auto:saliency", "auto:tracing")
"""Ways to let the facts choose the layers."""

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def model_option(default: str | None = "pocket") -> Callable[[F], F]:
    """`-m`, `--dtype` and `--device`."""
    told = {"show_default": True} if default else {}

    def decorate(command: F) -> F:
        command = click.option(
            "--device",
            help="Where to run, e.g. cpu, cuda or cuda:1; the CPU unless told otherwise.",
        )(command)
        command = click.option(
            "--dtype", help="float32, bfloat16 or float16; the model's own unless told otherwise."
        )(command)
        return click.option(
            "-m",
            "--model",
            default=default,
            help="A model that comes with errata (`errata models`), a folder or a Hub name."
            + ("" if default else " By default the one that the edit was made for."),
            **told,  # type: ignore[arg-type]
        )(command)

    return decorate


def fact_options(command: F) -> F:
    """FACTS, `--subject`, `--prompt`, `--target`, `--true`, `--cases` and `-n`."""
    for option in reversed(
        (
            click.argument("facts", required=False, type=EXISTING_FILE),
            click.option("--subject", help="Instead of a file: whom or what the fact is about."),
            click.option(
                "--prompt",
                help="The statement up to its object, {} where the subject stands.",
            ),
            click.option("--target", help="What the model should say next."),
            click.option("--true", "true", help="What it says today; scores compare with it."),
            click.option(
                "--cases",
                metavar="SOURCE",
                help="Instead of FACTS: facts that bring their own checks. `pocket`, JSON lines, "
                "or a published data set.",
            ),
            click.option(
                "-n", "--count", type=click.IntRange(min=1), help="Only the first so many facts."
            ),
        )
    ):
        command = option(command)
    return command


def check_facts(
    facts: Path | None, cases: str | None, by_hand: dict[str, str | None], *, needed: bool = True
) -> None:
    """Refuse facts that are given in several ways, by half or, where they are needed, not at all.

    Args:
        facts: the file FACTS.
        cases: the value of `--cases`.
        by_hand: the options that a fact by hand needs, with their values.
        needed: whether the command has no facts of its own.
    """
    given = [value for value in by_hand.values() if value is not None]
    names = [f"--{name}" for name in by_hand]
    parts = f"{', '.join(names[:-1])} and {names[-1]}"
    if given and len(given) < len(by_hand):
        raise click.UsageError(f"a fact by hand needs all of {parts}.")
    ways = bool(facts) + bool(given) + bool(cases)
    if ways > 1 or (needed and not ways):
        raise click.UsageError(f"give the facts in one way: a file FACTS, or {parts}, or --cases.")


EDITED = (
    "Blocks to edit, such as 5, 3-8 or 1,2,5; auto:saliency or auto:tracing lets the facts choose."
)


def method_options(default: str, *, layers_help: str = EDITED) -> Callable[[F], F]:
    """`--method`, `--layers`, `--set` and `--corpus`."""

    def decorate(command: F) -> F:
        command = click.option(
            "--corpus",
            metavar="TEXT",
            help="Ordinary text for the second moments: a file, a folder or hub:NAME.",
        )(command)
        command = click.option(
            "--set",
            "pairs",
            metavar="KEY=VALUE",
            multiple=True,
            help="One of the method's numbers, such as target.updates=40. May be repeated.",
        )(command)
        command = click.option("--layers", help=layers_help)(command)
        return click.option(
            "--method", default=default, show_default=True, help="See `errata methods`."
        )(command)

    return decorate


def editor_option(command: F) -> F:
    """`--editor`."""
    return click.option(
        "--editor",
        metavar="FILE",
        type=EXISTING_FILE,
        help="Instead of a method: an editor that `errata fit` made for this model.",
    )(command)


def check_editor(editor: Path | None, **others: object) -> None:
    """Refuse numbers of a method beside an editor that was fitted with its own.

    Args:
        editor: the value of `--editor`.
        others: values of the options that do not go with it, by name.
    """
    if editor is None:
        return
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    source = click.get_current_context().get_parameter_source("method")
    if source is click.core.ParameterSource.COMMANDLINE:
        given = ["--method", *given]
    if given:
        raise click.UsageError(
            f"{' and '.join(given)} cannot be given with --editor: it was fitted with a method and "
            "numbers of its own."
        )


def settings(pairs: Sequence[str], *, option: str = "--set") -> dict[str, Any]:
    """`("layers=[1,2]", "target.updates=40")` as a mapping; values are TOML, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(
                f"{pair!r} is not of the form key=value, such as target.updates=40.",
                param_hint=option,
            )
        found[name.strip()] = _value(value.strip())
    return found


def edited_layers(text: str | None) -> list[int] | str | None:
    """As `layers`; `auto:saliency` and `auto:tracing` as they are."""
    if text is None or not text.startswith("auto"):
        return layers(text)
    if text not in AUTOMATIC:
        raise click.BadParameter(
            f"there is no {text!r}; write {' or '.join(AUTOMATIC)}, or name the layers.",
            param_hint="--layers",
        )
    return text


def layers(text: str | None) -> list[int] | None:
    """`3-8`, `5` or `1,2,5` as numbers."""
    if text is None:
        return None
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        numbers = []
    if not numbers:
        raise click.BadParameter(
            f"{text!r} names no layers; write 5, 3-8 or 1,2,5 (the first block is 0).",
            param_hint="--layers",
        )
    return numbers


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
