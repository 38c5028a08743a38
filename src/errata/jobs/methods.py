"""From a method's name and some settings to an editor that is ready to work."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from errata.editors import EDITORS, Background, Config, Editor, EditorConfig, Method
from errata.editors.recipes import recipe
from errata.editors.recipes import recipes as recipes_of
from errata.editors.trainable import Trainable
from errata.errors import ConfigError
from errata.lm.load import LanguageModel


def method_named(name: str) -> Method:
    """A line of the table of methods.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in EDITORS:
        raise ConfigError(f"there is no method {name!r}; there are {', '.join(sorted(EDITORS))}.")
    return EDITORS[name]


def editor_for(
    lm: LanguageModel, method: str, settings: Mapping[str, Any] | None, background: Background
) -> Editor:
    """A method's editor with the recipe for this model, if there is one, and some settings.

    Args:
        lm: the model; its name decides the recipe.
        method: a name in `EDITORS`.
        settings: what differs from recipe and defaults; `target.updates` names a nested field.
        background: ordinary text of the model.

    Raises:
        ConfigError: the method or a setting is unknown, a value does not fit, or the method does
            not edit models of this kind.
    """
    entry = method_named(method)
    if lm.kind not in entry.kinds:
        edits = " and ".join(f"{kind}s" for kind in entry.kinds)
        raise ConfigError(
            f"{method} edits {edits}; {lm.name} is an {lm.kind} ({lm.config.model_type})."
        )
    return entry.editor(config_for(method, lm.name, settings), background)


def config_for(method: str, model_name: str, settings: Mapping[str, Any] | None) -> EditorConfig:
    """A method's numbers on a model: the recipe for it, if there is one, and some settings.

    Raises:
        ConfigError: the method or a setting is unknown, or a value does not fit.
    """
    values = merged(recipe(method, model_name) or {}, nested(settings or {}))
    return method_named(method).config.from_dict(values)


def learns(method: str) -> bool:
    """Whether a method must be fitted to a model before it edits it.

    Raises:
        ConfigError: there is no such method.
    """
    return issubclass(method_named(method).editor, Trainable)


def methods() -> dict[str, Method]:
    """The table of methods."""
    return EDITORS


def recipes() -> dict[str, list[str]]:
    """Method -> the models for which there are numbers from the papers."""
    return {method: recipes_of(method) for method in EDITORS}


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"target.updates": 40}` as `{"target": {"updates": 40}}`.

    Raises:
        ConfigError: a name is used both as a value and as a table.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *tables, last = name.split(".")
        place = found
        for table in tables:
            inner = place.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{name!r}: {table!r} has a value already and is no table.")
            place = inner
        place[last] = value
    return found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `over` first; tables are merged field by field."""
    found = dict(base)
    for name, value in over.items():
        inner = found.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merged(inner, value)
        found[name] = value
    return found


@dataclass(frozen=True)
class Setting:
    """One number of a method."""

    name: str
    default: str
    meaning: str


def settings(method: str) -> list[Setting]:
    """All settings of a method, with the sentences under their fields.

    Raises:
        ConfigError: there is no such method.
    """
    return list(_settings(method_named(method).config()))


def _settings(config: Config, prefix: str = "") -> Iterator[Setting]:
    meanings = _meanings(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            yield from _settings(value, f"{prefix}{field.name}.")
        else:
            yield Setting(prefix + field.name, repr(value), meanings.get(field.name, ""))


def _meanings(config: type[Config]) -> dict[str, str]:
    """Field -> the sentence under it, own fields before inherited ones."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for before, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[before.target.id] = " ".join(str(after.value.value).split())
    return found
