"""A method's numbers: plain values, named, each with a sentence on what it means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from errata.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """A method's numbers. No module path, device or model name; unknown fields are refused."""

    def __post_init__(self) -> None:
        """Refuse a word where its field's `Literal` does not list it."""
        for name, known in _choices(type(self)).items():
            value = getattr(self, name)
            self._require(value in known, f"{name} is one of {', '.join(known)}, not {value!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as a recipe or a command line gives them; tables nest.

        Raises:
            ConfigError: a field is unknown or its value does not fit.
        """
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(values.keys() - known.keys()):
            raise ConfigError(f"{cls.__name__} has no {unknown}; it has {sorted(known)}.")
        defaults = cls()
        converted: dict[str, Any] = {}
        for name, value in values.items():
            default = getattr(defaults, name)
            if isinstance(default, Config) and isinstance(value, Mapping):
                # A nested table overrides single fields and keeps this method's own other defaults.
                value = type(default).from_dict({**default.to_dict(), **value})
            converted[name] = _tuples(value)
        try:
            return cls(**converted)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.to_dict() if isinstance(v, Config) else v for name, v in values.items()}

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}")

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(value >= 1, f"{name} must be at least 1, got {value}.")

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            finite = math.isfinite(value)
            self._require(finite and value > 0, f"{name} must be positive, got {value}.")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            finite = math.isfinite(value)
            self._require(finite and value >= 0, f"{name} must not be negative, got {value}.")


@dataclass(frozen=True)
class EditorConfig(Config):
    """What the numbers of every method have."""

    layers: tuple[int, ...] = ()
    """Edited blocks, ascending. Empty: the method's usual place, as a share of the depth."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        """Refuse layers out of order."""
        super().__post_init__()
        ascending = list(self.layers) == sorted(set(self.layers)) and all(
            layer >= 0 for layer in self.layers
        )
        self._require(
            ascending, f"layers must be ascending, unique and not negative, got {self.layers}."
        )


def _choices(config: type[Config]) -> dict[str, tuple[str, ...]]:
    """Of each field that is a `Literal`, what it may be."""
    hints = get_type_hints(config).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
