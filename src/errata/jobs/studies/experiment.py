"""An experiment is a file: models, editors, data, protocol, sweeps, seeds; here it becomes units.

::

    title = "Does the equality constraint hold up in batches? (EMMET, arXiv:2403.14236, figure 3)"
    models = ["pocket", "pocket-llama"]
    data = "pocket"
    count = 200
    seeds = [0, 1, 2]                     # of the sample of cases, and of every random draw

    [protocol]
    kind = "batch"                        # or "single", "sequential"

    [[editor]]
    label = "MEMIT"
    method = "memit"
    settings = { relaxation = 0.05 }
    [editor.for.pocket-llama]             # settings for one of the models
    layers = [1]

    [[editor]]
    method = "emmet"

    [[editor]]
    method = "mend"                       # a method that must learn first
    [editor.fit]                          # what from (see `fits`); may be left out
    data = "pocket"
    count = 600

    [sweep]
    "protocol.batch" = [1, 4, 16]
    "settings.target.clamp" = [1.0, 1.5]

Every field is known by name; a typo is refused, never a default. A `Unit` is one cell of all this:
one model, editor, choice of the swept values, and seed. The sections `table`, `figure` and `claim`
say what is made of the results, and are read where that happens.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

from errata.errors import ConfigError, ErrataError
from errata.jobs.cases import POCKET
from errata.jobs.methods import merged, methods, nested
from errata.jobs.studies.fields import Fields, meant
from errata.jobs.studies.units import (
    KINDS,
    METRICS,
    SWEPT,
    UNEDITED,
    Kind,
    Metrics,
    Unit,
    checked,
    field_of,
)

__all__ = ["KINDS", "SWEPT", "UNEDITED", "Experiment", "Kind", "Unit", "field_of", "meant"]

FOLDER = Path("experiments")
"""Where experiments are looked for by name."""

REPORTED = ("table", "figure", "claim")
"""Sections that are handed on as they are."""


@dataclass(frozen=True)
class EditorEntry:
    """One `[[editor]]`."""

    label: str
    method: str
    settings: Mapping[str, Any]
    per_model: Mapping[str, Mapping[str, Any]]
    models: tuple[str, ...]
    """The models that it runs on; empty means all."""
    fit: Mapping[str, Any] | None
    """What it learns from, as far as the file says."""
    sweep: Mapping[str, tuple[Any, ...]]

    def settings_on(self, model: str) -> dict[str, Any]:
        """All settings that the file gives for a model."""
        return merged(self.settings, self.per_model.get(model, {}))


@dataclass(frozen=True)
class Experiment:
    """What a file says, checked."""

    name: str
    path: Path
    title: str
    models: tuple[str, ...]
    editors: tuple[EditorEntry, ...]
    seeds: tuple[int, ...]
    base: Unit
    """What all units share."""
    sweep: Mapping[str, tuple[Any, ...]]
    about_models: Mapping[str, Mapping[str, Any]]
    """`[model.NAME]`: dtype, device, and the shape of a model that is not here."""
    reported: Mapping[str, Sequence[Mapping[str, Any]]]
    """The sections `table`, `figure` and `claim`, as they are in the file."""

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """Read `experiments/NAME.toml`, or the file at a path.

        Raises:
            ConfigError: there is no such file, it is not TOML, or something in it is unknown or
                does not fit; the message says where.
        """
        path = _find(name)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from error
        try:
            return cls._read(path, values)
        except ErrataError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _read(cls, path: Path, values: Mapping[str, Any]) -> Self:
        top = Fields(values, "the file")
        shared = (
            "variant",
            "data",
            "count",
            "corpus",
            "corpus_tokens",
            "generation",
            "generation_count",
        )
        tables = ("protocol", "editor", "sweep", "model", *REPORTED)
        top.only("title", "models", "seeds", "metrics", *shared, *tables)
        models = top.texts("models")
        editors = tuple(_editor(table, models) for table in top.tables("editor"))
        sweep = _sweep(top.table("sweep"))
        base = replace(
            _protocol(top.table("protocol"), sweep),
            variant=top.maybe_text("variant"),
            data=top.text("data", POCKET),
            count=top.number("count"),
            metrics=_metrics(top),
            generation=top.flag("generation"),
            generation_count=top.number("generation_count"),
            corpus=top.maybe_text("corpus"),
            corpus_tokens=top.number("corpus_tokens"),
        )
        if not editors:
            raise ConfigError("there is no [[editor]], so there is nothing to do.")
        labels = [editor.label for editor in editors]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"two editors are called {label!r}; give each its own label.")
        made = cls(
            name=path.stem,
            path=path,
            title=top.text("title", path.stem),
            models=models,
            editors=editors,
            seeds=top.numbers("seeds", (0,)),
            base=base,
            sweep=sweep,
            about_models=_about_models(top.table("model"), models),
            reported={name: [one.values for one in top.tables(name)] for name in REPORTED},
        )
        made.units()  # so that a wrong setting is found now
        return made

    def units(self) -> list[Unit]:
        """All units, those of one model together, each once.

        Raises:
            ConfigError: a combination makes no sense.
        """
        return list({repr(unit): unit for unit in self._units()}.values())

    def _units(self) -> Iterator[Unit]:
        for model, seed, editor in product(self.models, self.seeds, self.editors):
            if editor.models and model not in editor.models:
                continue
            unit = replace(
                self.base,
                model=model,
                seed=seed,
                label=editor.label,
                method=editor.method,
                settings=editor.settings_on(model),
                fit=editor.fit,
                **{k: v for k, v in self.about_models.get(model, {}).items() if k in _PLACED},
            )
            sweep = {**self.sweep, **editor.sweep}
            if editor.method == UNEDITED:
                sweep = {k: v for k, v in sweep.items() if k in _SAMPLE}
            for values in product(*sweep.values()):
                yield checked(_swept(unit, dict(zip(sweep, values, strict=True))))


_SAMPLE = ("variant", "data", "count", "generation", "generation_count")
_PLACED = ("dtype", "device")
_SHAPE = ("layers", "d_model", "d_ff", "vocabulary")


def _find(name: str | Path) -> Path:
    path, named = Path(name), FOLDER / f"{name}.toml"
    if path.suffix == ".toml" and path.is_file():
        return path
    if named.is_file():
        return named
    there = sorted(file.stem for file in FOLDER.glob("*.toml"))
    raise ConfigError(
        f"there is no experiment {str(name)!r}: no file {path if path.suffix else named}."
        + meant(path.stem, there)
        + (f" There are {', '.join(there)}." if there else "")
    )


def _editor(table: Fields, models: Sequence[str]) -> EditorEntry:
    table.only("label", "method", "settings", "for", "models", "fit", "sweep")
    method = table.text("method")
    if method not in (known := [*methods(), UNEDITED]):
        raise ConfigError(
            f"{table.where}: there is no method {method!r}; there are {', '.join(known)}."
            + meant(method, known)
        )
    per_model = table.table("for")
    for name in per_model.values:
        _one_of_the_models(name, models, f"{table.where}, `for`")
    chosen = table.texts("models", ())
    for name in chosen:
        _one_of_the_models(name, models, f"{table.where}, `models`")
    return EditorEntry(
        label=table.text("label", "unedited" if method == UNEDITED else method.upper()),
        method=method,
        settings=nested(table.table("settings").values),
        per_model={name: nested(per_model.table(name).values) for name in per_model.values},
        models=chosen,
        fit=_fit(table.table("fit")) if "fit" in table.values else None,
        sweep=_sweep(table.table("sweep"), only_settings=True),
    )


def _fit(table: Fields) -> Mapping[str, Any]:
    table.only("data", "count", "clear_of")
    table.maybe_text("data")
    for name in ("count", "clear_of"):
        table.number(name)
    return table.values


def _one_of_the_models(name: str, models: Sequence[str], where: str) -> None:
    if name not in models:
        raise ConfigError(
            f"{where}: {name!r} is none of this experiment's models, {', '.join(models)}."
            + meant(name, models)
        )


def _protocol(table: Fields, sweep: Mapping[str, tuple[Any, ...]]) -> Unit:
    table.only("kind", "batch", "every", "stop")
    kind = table.text("kind", "single")
    if kind not in KINDS:
        raise ConfigError(
            f"{table.where}: kind is one of {', '.join(KINDS)}, not {kind!r}." + meant(kind, KINDS)
        )
    batch, every, stop = table.number("batch"), table.number("every"), table.table("stop")
    kinds = sweep.get("protocol.kind", (kind,))
    if set(kinds) == {"single"} and (batch not in (None, 1) or "protocol.batch" in sweep):
        raise ConfigError(
            f'{table.where}: in the protocol "single" each case is alone; for batches, kind is '
            '"batch" or "sequential".'
        )
    streams = every is not None or stop.values or "protocol.every" in sweep
    if "sequential" not in kinds and streams:
        raise ConfigError(f'{table.where}: only kind = "sequential" has `every` and `stop`.')
    stop.only("perplexity", "retention")
    for name, value in stop.values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{stop.where}: {name} is a positive number, not {value!r}.")
    thresholds = {name: float(value) for name, value in stop.values.items()}
    return Unit("", "", "", protocol=kind, batch=batch or 1, every=every or 1, stop=thresholds)


def _metrics(top: Fields) -> tuple[Metrics, ...]:
    chosen = top.texts("metrics", ("probability",))
    for name in chosen:
        if name not in METRICS:
            raise ConfigError(
                f"metrics are of {', '.join(METRICS)}; {name!r} is none of them."
                + meant(name, METRICS)
            )
    return tuple(known for name in chosen for known in METRICS if known == name)


def _sweep(table: Fields, *, only_settings: bool = False) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, values in table.values.items():
        known = [] if only_settings else list(SWEPT)
        if name not in known and not name.startswith("settings."):
            also = " `models` and `seeds` are lists already." if name in ("model", "seed") else ""
            raise ConfigError(
                f"{table.where}: cannot sweep over {name!r}; known are "
                f"{', '.join([*known, 'settings.*'])}.{meant(name, known)}{also}"
            )
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{table.where}: {name!r} needs a list of values, not {values!r}.")
        found[name] = tuple(values)
    return found


def _swept(unit: Unit, values: Mapping[str, Any]) -> Unit:
    settings = {n.removeprefix("settings."): v for n, v in values.items() if n not in SWEPT}
    changed: dict[str, Any] = {SWEPT[name]: v for name, v in values.items() if name in SWEPT}
    # A swept value is checked as the file's own would be.
    told = Fields({name: v for name, v in values.items() if name in SWEPT}, "sweep")
    for name in ("count", "corpus_tokens", "generation_count", "protocol.batch", "protocol.every"):
        told.number(name)
    for name in ("variant", "data", "corpus"):
        told.maybe_text(name)
    told.flag("generation")
    if told.text("protocol.kind", "single") not in KINDS:
        raise ConfigError(f"sweep: protocol.kind is one of {', '.join(KINDS)}.")
    return replace(unit, **changed, settings=merged(unit.settings, nested(settings)))


def _about_models(table: Fields, models: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    found = {}
    for name in table.values:
        _one_of_the_models(name, models, table.where)
        one = table.table(name)
        one.only(*_PLACED, *_SHAPE)
        for key in _PLACED:
            one.maybe_text(key)
        for key in _SHAPE:
            one.number(key)
        found[name] = one.values
    return found
