"""A unit: one piece of an experiment's work, described in full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

from errata.editors import EDITORS, EditorConfig
from errata.edits.edit import as_json
from errata.errors import ConfigError
from errata.jobs.cases import POCKET
from errata.jobs.layers import WAYS
from errata.jobs.methods import config_for, learns, methods
from errata.jobs.studies.fields import meant
from errata.measure.editing import COMPARISONS, Comparison
from errata.measure.score import PROTOCOLS, Protocol
from errata.requests import UNLESS_DEFAULT, VARIANTS

Kind = Literal["single", "batch", "sequential"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Metrics = Protocol | Comparison
METRICS: tuple[Metrics, ...] = (*PROTOCOLS, *COMPARISONS)
"""What a unit can measure."""

UNEDITED = "none"
"""The method that changes nothing: its rows are the unedited model's."""


@dataclass(frozen=True)
class Unit:
    """One piece of work, described in full: the same unit gives the same results in any study."""

    model: str
    label: str
    """What tables call the editor; it changes nothing else."""
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the method's recipe and defaults; tables nest."""
    fit: Mapping[str, Any] | None = None
    """What a method that must learn first learns from (see `fits`); None for others."""
    variant: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Pose the cases that the model knows as this problem (`errata.jobs.variants`); None takes all
    as they are."""
    data: str = POCKET
    count: int | None = None
    """Cases in the sample; None takes all."""
    seed: int = 0
    """Of the sample of cases, and of everything random in the editor."""
    protocol: Kind = "single"
    batch: int = 1
    """Facts written at once."""
    every: int = 1
    """A stream is judged on all its facts so far after every so many batches."""
    stop: Mapping[str, float] = field(default_factory=dict)
    """Where a stream ends early: `perplexity`, how many times that of the unedited model;
    `retention`, the least share of earlier edits that must still hold."""
    metrics: tuple[Metrics, ...] = ("probability",)
    """Protocols of `errata.measure.score`, and comparisons of `errata.measure.editing`."""
    generation: bool = False
    """Also score free text."""
    generation_count: int | None = None
    """Of so many cases at most."""
    corpus: str | None = None
    """Ordinary text for the second moments."""
    corpus_tokens: int | None = None
    dtype: str | None = None
    device: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        values: dict[str, Any] = as_json(self)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a unit back."""
        return cls(**{**values, "metrics": tuple(values["metrics"])})

    def __str__(self) -> str:
        """Such as `MEMIT on pocket, batches of 16, seed 0`."""
        how = {"single": "each alone", "batch": f"batches of {self.batch}"}
        stream = f"a stream of batches of {self.batch}" if self.batch > 1 else "a stream"
        posed = f", {self.variant}" if self.variant else ""
        way = how.get(self.protocol, stream)
        return f"{self.label} on {self.model}{posed}, {way}, seed {self.seed}"


SWEPT = {
    "variant": "variant",
    "data": "data",
    "count": "count",
    "corpus": "corpus",
    "corpus_tokens": "corpus_tokens",
    "generation": "generation",
    "generation_count": "generation_count",
    "protocol.kind": "protocol",
    "protocol.batch": "batch",
    "protocol.every": "every",
}
"""What a sweep may go over, beside `settings.*` -> the unit's field."""


def field_of(unit: Mapping[str, Any], name: str) -> Any:
    """A unit's value by the name that a sweep gives it, such as `settings.target.clamp`.

    None where the unit does not say: a setting left to the method's recipe or default.
    """
    found: Any = unit
    for part in SWEPT.get(name, name).split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def chosen_by(unit: Unit) -> str:
    """How the facts choose a unit's layers, such as `auto:tracing`; empty where they do not.

    Raises:
        ConfigError: there is no such way.
    """
    layers = unit.settings.get("layers")
    if isinstance(layers, str) and layers not in WAYS:
        raise ConfigError(f"layers = {layers!r}: give a list of blocks, or {' or '.join(WAYS)}.")
    return layers if isinstance(layers, str) else ""


def settings_of(unit: Unit) -> dict[str, Any]:
    """A unit's settings, but for layers that the facts choose."""
    return {n: v for n, v in unit.settings.items() if n != "layers" or not chosen_by(unit)}


def config_of(unit: Unit) -> EditorConfig:
    """All numbers of a unit's method; where the facts choose its layers, with the usual ones.

    Raises:
        ConfigError: there is no such method or setting.
    """
    return config_for(unit.method, unit.model, settings_of(unit))


def checked(unit: Unit) -> Unit:
    """The unit in its plainest form: what its protocol does not use is set to the default.

    Raises:
        ConfigError: its parts contradict each other, or its method has no such setting.
    """
    _check_variant(unit)
    if unit.method == UNEDITED:
        unit = replace(unit, protocol="single", settings={}, corpus=None, corpus_tokens=None)
    else:
        try:
            chosen_by(unit)
            config_of(unit)
        except ConfigError as error:
            raise ConfigError(f"editor {unit.label!r}: {error}") from error
    if unit.method != UNEDITED and learns(unit.method):
        usual = {"data": unit.data, "count": None, "clear_of": unit.count}
        unit = replace(unit, fit=(fit := usual | dict(unit.fit or {})))
        if fit["clear_of"] is not None and fit["clear_of"] < (unit.count or math.inf):
            raise ConfigError(
                f"editor {unit.label!r}, `fit`: with clear_of = {fit['clear_of']} it would learn "
                f"from some of the {unit.count or 'other'} cases that are evaluated; it is at "
                "least their number."
            )
    elif unit.fit is not None:
        raise ConfigError(
            f"editor {unit.label!r}: {unit.method} needs no fitting, so it has no `fit`; those "
            f"that are fitted: {', '.join(filter(learns, methods()))}."
        )
    if unit.protocol == "single":
        unit = replace(unit, batch=1)
    if unit.protocol != "sequential":
        unit = replace(unit, every=1, stop={})
    if unit.count is not None and unit.batch > unit.count:
        raise ConfigError(
            f"a batch of {unit.batch} cannot be made of {unit.count} cases; raise `count` or lower "
            "`protocol.batch`."
        )
    if unit.generation_count is not None and not unit.generation:
        unit = replace(unit, generation_count=None)
    return unit


def _check_variant(unit: Unit) -> None:
    if unit.variant is None:
        return
    if unit.variant not in VARIANTS:
        raise ConfigError(
            f"there is no variant {unit.variant!r}; there are {', '.join(VARIANTS)}."
            + meant(unit.variant, list(VARIANTS))
        )
    if unit.method != UNEDITED and unit.variant not in EDITORS[unit.method].editor.variants:
        raise ConfigError(f"editor {unit.label!r}: {unit.method} cannot do {unit.variant}.")
