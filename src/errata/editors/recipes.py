"""Recipes: the numbers that papers and their code use for a model, as TOML files.

A file `recipes/METHOD/NAME.toml` lists the names it is for (`models`, patterns with `*`, whatever
the case); all else in it are fields of the method's config. A new model is a new file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

from errata.errors import ConfigError


def recipe(method: str, model_name: str) -> dict[str, Any] | None:
    """The config values of `method` for a model, or None where there is no recipe.

    Args:
        method: e.g. "memit".
        model_name: a Hub name, with or without its owner, or a folder that is named like one.

    Raises:
        ConfigError: a recipe file is broken, or two are for the same name.
    """
    name = model_name.replace("\\", "/").rstrip("/").lower()
    found = {
        file: values
        for file, patterns, values in _all(method)
        if any(fnmatchcase(name, pattern.lower()) for pattern in patterns)
    }
    if len(found) > 1:
        raise ConfigError(
            f"the recipes {', '.join(sorted(found))} of {method} are all for {model_name!r}; make "
            "the patterns in their `models` narrower."
        )
    return next(iter(found.values()), None)


def recipes(method: str) -> list[str]:
    """Names of the recipes that a method has."""
    return sorted(file.removesuffix(".toml") for file, _, _ in _all(method))


def _all(method: str) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(file name, patterns, config values) of each of a method's recipes."""
    folder = resources.files("errata") / "recipes" / method
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".toml"):
            continue
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"the recipe {method}/{file.name} is not TOML: {error}") from error
        patterns = values.pop("models", None)
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise ConfigError(
                f"the recipe {method}/{file.name} needs a list `models` of the names it is for."
            )
        yield file.name, patterns, values
