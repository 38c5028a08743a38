"""Options that several commands share, and reading `--set key=value`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

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
            help="pocket, pocket-llama, a model folder or a Hub name."
            + ("" if default else " By default the one that the edit was made for."),
            **told,  # type: ignore[arg-type]
        )(command)

    return decorate


def method_options(default: str) -> Callable[[F], F]:
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
        command = click.option("--layers", help="Blocks to edit, such as 5, 3-8 or 1,2,5.")(command)
        return click.option(
            "--method", default=default, show_default=True, help="See `errata methods`."
        )(command)

    return decorate


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`("layers=[1,2]", "target.updates=40")` as a mapping; values are TOML, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(
                f"{pair!r} is not of the form key=value, such as target.updates=40.",
                param_hint="--set",
            )
        found[name.strip()] = _value(value.strip())
    return found


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
