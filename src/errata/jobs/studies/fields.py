"""Reading a table of an experiment's file: fields by name and type.

All methods raise a ConfigError that says where in the file, what was expected, and what was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from errata.errors import ConfigError


def meant(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?`, or nothing if nothing is near."""
    near = get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Fields:
    """A table of the file, and where it stands."""

    values: Mapping[str, Any]
    where: str

    def only(self, *known: str) -> None:
        """Refuse fields that are not known."""
        for name in self.values:
            if name not in known:
                raise ConfigError(
                    f"{self.where} has no field {name!r}; it has {', '.join(known)}."
                    + meant(name, known)
                )

    def text(self, name: str, default: str = "") -> str:
        """A text; without a default it must be there."""
        value = self.values.get(name, default)
        if not value and name not in self.values:
            raise ConfigError(f"{self.where} needs `{name}`.")
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self.where}: `{name}` must be a text, not {value!r}.")
        return value

    def maybe_text(self, name: str) -> str | None:
        """A text, or None where there is none."""
        return self.text(name) if name in self.values else None

    def number(self, name: str) -> int | None:
        """A whole number from 1, or None where there is none."""
        value = self.values.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < 1):
            raise ConfigError(
                f"{self.where}: `{name}` must be a whole number from 1, not {value!r}."
            )
        return value

    def flag(self, name: str) -> bool:
        """True or false; false where it is not there."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: `{name}` is true or false, not {value!r}.")
        return value

    def texts(self, name: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Different names; without a default there must be one."""
        values = self.values.get(name, default)
        fits = isinstance(values, list | tuple) and all(isinstance(v, str) and v for v in values)
        if not fits or (not values and default is None) or len(set(values)) < len(values):
            raise ConfigError(f"{self.where}: `{name}` must be a list of different names.")
        return tuple(values)

    def numbers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Different whole numbers from 0, at least one."""
        values = self.values.get(name, default)
        fits = isinstance(values, list | tuple) and all(type(v) is int and v >= 0 for v in values)
        if not fits or not values or len(set(values)) < len(values):
            raise ConfigError(
                f"{self.where}: `{name}` must be a list of different whole numbers from 0."
            )
        return tuple(values)

    def table(self, name: str) -> Fields:
        """A table inside; an empty one where there is none."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: `{name}` must be a table, not {value!r}.")
        where = name if self.where == "the file" else f"{self.where}, `{name}`"
        return Fields(value, where)

    def tables(self, name: str) -> list[Fields]:
        """Tables that are written as [[name]], numbered from 1."""
        values = self.values.get(name, [])
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            raise ConfigError(f"`{name}` must be written as [[{name}]].")
        return [Fields(value, f"{name} {number}") for number, value in enumerate(values, 1)]
