"""What a study shows of its results: the tables, figures and claims that its experiment declares.

::

    [[table]]
    title = "Single edits"
    rows = ["model", "editor"]            # a line for each combination of these
    columns = ["protocol.batch"]          # optional: side by side
    metrics = ["S", "ES", "PS", "NS"]
    where = { model = "pocket" }          # optional: only these; a list means any of them

    [[figure]]
    title = "Scores by batch size"
    kind = "line"                         # or "bar"; "scatter" is of one metric against another
    x = "protocol.batch"
    y = ["S", "ES"]                       # a chart for each
    series = ["editor"]
    panels = ["model"]                    # a chart for each
    log_x = true

    [[claim]]
    text = "ROME's and MEMIT's objectives are equally good at single edits."
    each = ["model"]                      # judged for each of these
    [claim.check]
    kind = "equal"
    metric = "S"
    within = 0.02
    a = { editor = "ROME" }
    b = { editor = "MEMIT" }

Fields are named as in a sweep (`protocol.batch`, `settings.target.clamp`); beside these there are
`editor`, `model`, `method` and `seed`, `relation`, which divides a unit's cases, and `edits`, which
divides a stream. As in the rest of the file, what is not known is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from errata.errors import ConfigError
from errata.jobs.studies.fields import Fields, meant
from errata.jobs.studies.rows import flat
from errata.jobs.studies.stream import IMMEDIATE
from errata.jobs.studies.units import SWEPT
from errata.measure.score import COLUMNS

RELATION = "relation"
"""The field that divides the cases of a unit."""

EDITS = "edits"
"""The field that divides a stream: how many facts are written by then."""

FIELDS = ("editor", "model", "method", "seed", *SWEPT, RELATION, EDITS)
"""What results can be ordered by, beside `settings.*`."""

STREAM = ("retention", "perplexity", "perplexity ratio", "KL neighbours", "KL text")
"""What is measured of a stream on its way, beside the scores."""

COSTS = (
    "parameters",
    "edit bytes",
    "edit seconds",
    "edit MB",
    "fit steps",
    "fit seconds",
    "fit MB",
)
"""What records tell of whole runs: numbers in the changed weights, an edit's size and seconds, the
most memory that was held; of a fit its steps to the best validation, seconds and memory. Seconds
and memory differ from run to run, so a report that shows them is not the same bytes twice."""

LEARNT = ("fit EA", "fit DD")
"""Of editors that are fitted: accuracy and drawdown on cases that were learnt from."""

METRICS = (*COLUMNS, *(f"{IMMEDIATE}{name}" for name in COLUMNS), *STREAM, *LEARNT, *COSTS)
"""What can be shown; `immediate.ES` is of each case right after its own batch of a stream."""

FIGURES = ("line", "bar", "scatter")

CHECKS: dict[str, tuple[str, ...]] = {
    "equal": ("a", "b", "within"),
    "greater": ("a", "b", "by"),
    "order": ("of",),
    "equal until": ("a", "b", "within", "along"),
}
"""Kind of check -> what it needs beside a metric."""

Where = Mapping[str, Any]
"""Field -> the value that it must have, or a list of them."""


@dataclass(frozen=True)
class TableSpec:
    """One `[[table]]`."""

    title: str
    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    columns: tuple[str, ...] = ()
    where: Where = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, Any], place: str) -> Self:
        """From a section of the file.

        Raises:
            ConfigError: something in it is unknown, missing or does not fit.
        """
        section = _Section(values, place)
        section.only("title", "rows", "columns", "metrics", "where")
        return cls(
            title=section.text("title"),
            rows=section.names("rows", FIELDS, needed=True),
            metrics=section.names("metrics", METRICS, needed=True),
            columns=section.names("columns", FIELDS),
            where=section.chosen("where"),
        )


@dataclass(frozen=True)
class FigureSpec:
    """One `[[figure]]`: a chart for each panel and each metric of `y`."""

    title: str
    kind: str
    x: str
    """A field; of a scatter, a metric."""
    y: tuple[str, ...]
    series: tuple[str, ...] = ()
    panels: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    """Of a scatter: a point for each combination of these."""
    where: Where = field(default_factory=dict)
    log_x: bool = False

    @classmethod
    def read(cls, values: Mapping[str, Any], place: str) -> Self:
        """From a section of the file.

        Raises:
            ConfigError: something in it is unknown, missing or does not fit.
        """
        section = _Section(values, place)
        section.only("title", "kind", "x", "y", "series", "panels", "points", "where", "log_x")
        kind = section.one_of("kind", FIGURES, "line")
        scatter = kind == "scatter"
        if not scatter and "points" in values:
            raise ConfigError(f'{place}: only kind = "scatter" has `points`.')
        if kind != "line" and "log_x" in values:
            raise ConfigError(f'{place}: only kind = "line" has `log_x`.')
        return cls(
            title=section.text("title"),
            kind=kind,
            x=section.names("x", METRICS if scatter else FIELDS, needed=True, single=True)[0],
            y=section.names("y", METRICS, needed=True),
            series=section.names("series", FIELDS),
            panels=section.names("panels", FIELDS),
            points=section.names("points", FIELDS, needed=scatter),
            where=section.chosen("where"),
            log_x=section.flag("log_x"),
        )


@dataclass(frozen=True)
class Check:
    """How a claim is judged: differences of a metric between results, with their intervals."""

    kind: str
    metric: str
    a: Where = field(default_factory=dict)
    b: Where = field(default_factory=dict)
    of: tuple[Where, ...] = ()
    """Of "order": from the largest to the smallest."""
    within: float = 0.0
    """Differences up to this count as none."""
    by: float = 0.0
    """How much greater `a` must be than `b`."""
    along: str = ""
    """Of "equal until": the field that grows."""

    @classmethod
    def read(cls, values: Mapping[str, Any], place: str) -> Self:
        """From a section of the file.

        Raises:
            ConfigError: something in it is unknown, missing or does not fit.
        """
        section = _Section(values, place)
        kind = section.one_of("kind", tuple(CHECKS))
        section.only("kind", "metric", *CHECKS[kind])
        for name in CHECKS[kind]:
            if name not in values and name != "by":
                raise ConfigError(f"{place} needs `{name}` for the kind {kind!r}.")
        return cls(
            kind=kind,
            metric=section.names("metric", METRICS, needed=True, single=True)[0],
            a=section.chosen("a"),
            b=section.chosen("b"),
            of=section.order("of"),
            within=section.amount("within", least=0),
            by=section.amount("by"),
            along=next(iter(section.names("along", FIELDS, single=True)), ""),
        )


@dataclass(frozen=True)
class ClaimSpec:
    """One `[[claim]]`."""

    text: str
    check: Check
    each: tuple[str, ...] = ()
    """Judged for each combination of these."""
    where: Where = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, Any], place: str) -> Self:
        """From a section of the file.

        Raises:
            ConfigError: something in it is unknown, missing or does not fit.
        """
        section = _Section(values, place)
        section.only("text", "check", "each", "where")
        return cls(
            text=section.text("text"),
            check=Check.read(section.table("check").values, f"{place}, `check`"),
            each=section.names("each", FIELDS),
            where=section.chosen("where"),
        )


@dataclass(frozen=True)
class Shown:
    """All that an experiment wants to see of its results."""

    tables: tuple[TableSpec, ...]
    figures: tuple[FigureSpec, ...]
    claims: tuple[ClaimSpec, ...]

    @classmethod
    def read(cls, reported: Mapping[str, Sequence[Mapping[str, Any]]]) -> Self:
        """From the sections of an experiment, `Experiment.reported`.

        Raises:
            ConfigError: something in them is unknown, missing or does not fit; it is named.
        """
        return cls(
            tables=tuple(TableSpec.read(v, f"table {n}") for n, v in _each(reported, "table")),
            figures=tuple(FigureSpec.read(v, f"figure {n}") for n, v in _each(reported, "figure")),
            claims=tuple(ClaimSpec.read(v, f"claim {n}") for n, v in _each(reported, "claim")),
        )


def _each(
    reported: Mapping[str, Sequence[Mapping[str, Any]]], name: str
) -> Sequence[tuple[int, Mapping[str, Any]]]:
    return list(enumerate(reported.get(name, ()), 1))


def check_name(name: Any, known: Sequence[str], place: str) -> None:
    """Refuse a field or a metric that does not exist.

    Args:
        name: as it was given.
        known: FIELDS or METRICS.
        place: where it was given.

    Raises:
        ConfigError: it is not known.
    """
    if name in known or (known is FIELDS and str(name).startswith("settings.")):
        return
    some = (*FIELDS, "settings.*") if known is FIELDS else (*COLUMNS[:9], "...", *STREAM, *COSTS)
    raise ConfigError(
        f"{place}: there is no {name!r}; there are {', '.join(some)}." + meant(str(name), known)
    )


@dataclass(frozen=True)
class _Section(Fields):
    """A section of the file."""

    def names(
        self, name: str, known: Sequence[str], *, needed: bool = False, single: bool = False
    ) -> tuple[str, ...]:
        """Fields or metrics; one alone may stand without a list."""
        value = self.values.get(name, [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or (needed and not found) or (single and len(found) > 1):
            what = "one name" if single else "a list of names"
            raise ConfigError(f"{self.where} needs {what} as `{name}`, not {value!r}.")
        for one in found:
            check_name(one, known, f"{self.where}, `{name}`")
        return tuple(found)

    def one_of(self, name: str, choices: Sequence[str], default: str = "") -> str:
        value = self.text(name, default)
        if value not in choices:
            raise ConfigError(
                f"{self.where}: `{name}` is one of {', '.join(choices)}, not {value!r}."
                + meant(value, choices)
            )
        return value

    def amount(self, name: str, *, least: float = -math.inf) -> float:
        value = self.values.get(name, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= least:
            kind = "a number" if least == -math.inf else f"a number from {least:g}"
            raise ConfigError(f"{self.where}: `{name}` is {kind}, not {value!r}.")
        return float(value)

    def chosen(self, name: str) -> Where:
        """Fields with dotted names; where TOML took a dot for a table, that is undone."""
        found = flat(self.table(name).values)
        for one in found:
            check_name(one, FIELDS, f"{self.where}, `{name}`")
        return found

    def order(self, name: str) -> tuple[Where, ...]:
        values = self.values.get(name, [])
        if not isinstance(values, list) or not all(isinstance(one, Mapping) for one in values):
            raise ConfigError(f"{self.where}: `{name}` is a list of tables, not {values!r}.")
        if name in self.values and len(values) < 2:
            raise ConfigError(f"{self.where}: `{name}` needs at least two to put in order.")
        return tuple(_Section({name: one}, self.where).chosen(name) for one in values)
