"""What causal tracing finds, and its averages over facts: numbers alone, kept as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from errata.errors import DatasetError
from errata.lm.noise import Noise
from errata.requests import Request

Part = Literal["mlp", "attention"]
Kind = Literal["state", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("state", "mlp", "attention")


@dataclass(frozen=True)
class Trace:
    """What restoring each token at each layer does for one fact."""

    request: Request
    tokens: tuple[str, ...]
    """The prompt, token by token."""
    subject: tuple[int, int]
    """The subject's first and last token."""
    answer: str
    """Whose probability is told."""
    predicted: str
    """What the model says by itself, in as many tokens."""
    kind: Kind
    """What was restored: a block's output, or outputs of MLPs or attentions."""
    window: int
    """Of how many layers around each; 1 for states."""
    severed: Part | None
    """Which part kept its corrupted outputs at the token, in the layers above."""
    clean: float
    """P, in the clean run."""
    corrupted: float
    """P*, in the corrupted one."""
    probabilities: tuple[tuple[float, ...], ...]
    """P with restoration, (tokens, layers)."""
    noise: Noise
    level: float
    """The noise's size in the embeddings' own unit."""
    model: str

    @property
    def total_effect(self) -> float:
        """P - P*: what there is to restore."""
        return self.clean - self.corrupted

    @property
    def effects(self) -> tuple[tuple[float, ...], ...]:
        """Indirect effects, P restored - P*, (tokens, layers)."""
        return tuple(tuple(p - self.corrupted for p in row) for row in self.probabilities)

    def to_dict(self) -> dict[str, Any]:
        """The trace in JSON's types; `from_dict` reads it back."""
        return asdict(self) | {"request": self.request.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote, perhaps through JSON.

        Raises:
            DatasetError: a field is missing or unknown.
        """
        values = _checked(cls, record)
        return cls(
            **values
            | {
                "request": Request.from_dict(values["request"]),
                "tokens": tuple(values["tokens"]),
                "subject": tuple(values["subject"]),
                "probabilities": tuple(map(tuple, values["probabilities"])),
                "noise": Noise(**_checked(Noise, values["noise"])),
            }
        )


@dataclass(frozen=True)
class Skipped:
    """A fact that was not traced."""

    request: Request
    predicted: str
    """What the model says instead."""
    why: str


@dataclass(frozen=True)
class Traces:
    """The traces of many facts."""

    traces: tuple[Trace, ...]
    """Fact after fact, each by every kind of restoration."""
    skipped: tuple[Skipped, ...] = ()
    """Facts that the model does not know."""

    def to_dict(self) -> dict[str, Any]:
        """The traces in JSON's types; `from_dict` reads them back."""
        return {
            "traces": [trace.to_dict() for trace in self.traces],
            "skipped": [asdict(s) | {"request": s.request.to_dict()} for s in self.skipped],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote, perhaps through JSON.

        Raises:
            DatasetError: a field is missing or unknown.
        """
        values = _checked(cls, record)
        skipped = [_checked(Skipped, record) for record in values["skipped"]]
        return cls(
            tuple(map(Trace.from_dict, values["traces"])),
            tuple(
                Skipped(Request.from_dict(s["request"]), s["predicted"], s["why"]) for s in skipped
            ),
        )


CLASSES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""What tokens are to a prompt, as in the paper's figures."""


@dataclass(frozen=True)
class AverageEffect:
    """Indirect effects by token class and layer, averaged over facts, with 95% intervals.

    NaN where no fact has such a token, and for the bounds where only one has (null in JSON).
    """

    kind: Kind
    window: int
    severed: Part | None
    model: str
    clean: float
    """Mean of P."""
    corrupted: float
    """Mean of P*."""
    mean: tuple[tuple[float, ...], ...]
    """(classes, layers)."""
    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]
    n: tuple[tuple[int, ...], ...]
    """How many facts have a token of the class; the same for all layers."""
    classes: tuple[str, ...] = CLASSES

    def to_dict(self) -> dict[str, Any]:
        """The averages in JSON's types; `from_dict` reads them back."""
        tables = {
            name: [[None if math.isnan(x) else x for x in row] for row in getattr(self, name)]
            for name in ("mean", "low", "high")
        }
        return asdict(self) | tables

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote, perhaps through JSON.

        Raises:
            DatasetError: a field is missing or unknown.
        """
        values = _checked(cls, record)
        for name in ("mean", "low", "high", "n"):
            values[name] = tuple(
                tuple(math.nan if x is None else x for x in row) for row in values[name]
            )
        return cls(**values | {"classes": tuple(values["classes"])})


def average(traces: Sequence[Trace]) -> AverageEffect:
    """Average the indirect effects of many facts, token class by token class.

    A fact counts once in each class: its tokens of the class are averaged first. Classes may share
    a token: a subject of one token begins and ends with it. Tokens before the subject are in none.
    Intervals are 1.96 std / sqrt(n).

    Raises:
        DatasetError: there is no trace, or they are not all of one model and one kind.
    """
    if not traces:
        raise DatasetError("there is no trace to average.")
    sorts = {(t.model, t.kind, t.window, t.severed, len(t.probabilities[0])) for t in traces}
    if len(sorts) > 1:
        raise DatasetError(
            f"traces of different kinds cannot be averaged: {sorted(map(str, sorts))} (model, "
            "kind, window, severed, layers). Average each kind by itself."
        )
    ((model, kind, window, severed, layers),) = sorts
    found: list[list[NDArray[np.float64]]] = [[] for _ in CLASSES]
    for trace in traces:
        effects = np.array(trace.effects)
        for values, tokens in zip(found, _classes(trace), strict=True):
            if tokens:
                values.append(effects[tokens].mean(axis=0))
    mean, low, high, n = zip(*(_interval(values, layers) for values in found), strict=True)
    return AverageEffect(
        kind=kind,
        window=window,
        severed=severed,
        model=model,
        clean=float(np.mean([trace.clean for trace in traces])),
        corrupted=float(np.mean([trace.corrupted for trace in traces])),
        mean=mean,
        low=low,
        high=high,
        n=n,
    )


def _classes(trace: Trace) -> list[list[int]]:
    """The tokens of each class."""
    (first, last), end = trace.subject, len(trace.tokens) - 1
    after = [last + 1] if last < end else []
    return [
        [first],
        list(range(first + 1, last)),
        [last],
        after,
        list(range(last + 2, end)),
        [end],
    ]


def _interval(
    values: Sequence[NDArray[np.float64]], layers: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """Mean, bounds and count of n rows of `layers` numbers."""
    n = len(values)
    unknown = np.full(layers, math.nan)
    mean = np.mean(values, axis=0) if n else unknown
    half = 1.96 * np.std(values, axis=0, ddof=1) / math.sqrt(n) if n > 1 else unknown
    low, high = tuple((mean - half).tolist()), tuple((mean + half).tolist())
    return tuple(mean.tolist()), low, high, (n,) * layers


def _checked(cls: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's values, if they are those of a dataclass.

    Raises:
        DatasetError: a field is missing or unknown.
    """
    names = {f.name for f in fields(cls)}
    if record.keys() != names:
        raise DatasetError(
            f"this is not a {cls.__name__} as this errata writes it: it lacks "
            f"{sorted(names - record.keys())} and has {sorted(record.keys() - names)} besides."
        )
    return dict(record)
