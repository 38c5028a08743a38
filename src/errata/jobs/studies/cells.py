"""What several runs say together: results that differ in their seed alone make one cell.

A seed draws a sample of cases, so a case may be in several runs of a cell. Its values are
averaged over them first, and it counts once: means and 95% intervals are over cases (Wilson's
where each says yes or no, else the normal one; for S a bootstrap; see `errata.measure.metrics`).
The intervals are of the choice of cases. Facts that were written in one batch share its fate,
which they do not show.

What only whole runs have, such as a point of a stream, is averaged over runs; their intervals are
put together as those of independent samples.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, TypeVar

from errata.errors import ConfigError
from errata.jobs.studies.rows import Row, flat, to_json
from errata.jobs.studies.shown import EDITS, LEARNT, RELATION, Where
from errata.jobs.studies.stream import IMMEDIATE
from errata.jobs.studies.units import UNEDITED, field_of
from errata.measure.metrics import Estimate
from errata.measure.score import Scores

_T = TypeVar("_T")

Place = tuple[Any, ...]
"""Values of some fields, in their order; lists are tuples."""

Part = tuple[str | None, int | None]
"""(relation, edits): only these cases of a run, and as a stream stood after so many facts."""


@dataclass(frozen=True)
class Run:
    """A unit that the experiment asks for, and its row once there is one."""

    unit: Mapping[str, Any]
    row: Row | None = None


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone."""

    runs: tuple[Run, ...]
    relations: frozenset[str] | None = None
    """Only cases of these relations; None is all."""
    edits: int | None = None
    """As the streams stood after so many facts; None is at the end."""

    @property
    def name(self) -> str:
        """Of what the runs share, the same in every report: where it tells of them."""
        return name_of(self.runs[0].unit)

    @property
    def done(self) -> list[Row]:
        """The rows that have results, with the cases that the cell is about."""
        rows = [run.row for run in self.runs if run.row is not None and run.row.status == "done"]
        if (wanted := self.relations) is None:
            return rows
        return [
            replace(row, cases=tuple(c for c in row.cases if c.get(RELATION) in wanted))
            for row in rows
        ]

    @property
    def lacking(self) -> int:
        """How many of the runs have failed, or are not done yet."""
        return len(self.runs) - len(self.done)

    @cached_property
    def cases(self) -> dict[str, dict[str, float]]:
        """Case -> metric -> its mean over the runs that measured it there."""
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in self.done:
            for case in row.cases:
                for name, value in case["metrics"].items():
                    if not math.isnan(value):
                        found[str(case["case_id"])][name].append(value)
        return {
            case: {name: sum(values) / len(values) for name, values in metrics.items()}
            for case, metrics in sorted(found.items())
        }

    @cached_property
    def summary(self) -> dict[str, Estimate]:
        """Every metric of the cell."""
        if self.edits is not None:
            return _together([_at(row, self.edits) for row in self.done])
        done = [] if self.relations else [dict(row.metrics) | _costs(row) for row in self.done]
        found = _together(done)
        for prefix in ("", IMMEDIATE):
            rows = [
                {n.removeprefix(prefix): v for n, v in case.items() if n.startswith(prefix)}
                for case in self.cases.values()
            ]
            measured = Scores(tuple({"metrics": row} for row in rows)).summary()
            found |= {prefix + name: estimate for name, estimate in measured.items()}
        return found


def name_of(unit: Mapping[str, Any]) -> str:
    """A name for everything in a unit but its seed, `unit-` and a short hash."""
    shared = {name: value for name, value in unit.items() if name != "seed"}
    return f"unit-{hashlib.sha256(to_json(shared).encode()).hexdigest()[:12]}"


def cells(runs: Sequence[Run], by: Sequence[str], where: Where | None = None) -> dict[Place, Cell]:
    """Runs put together by the fields that tell them apart, in the experiment's order.

    Args:
        runs: of one experiment.
        by: fields, as `errata.jobs.studies.shown` names them.
        where: only these.

    Raises:
        ConfigError: runs with the same values in these fields differ in more than their seed, so
            that their average would hide something.
    """
    where = where or {}
    found: dict[Place, dict[int, list[Part]]] = {}
    for number, run in enumerate(runs):
        for part in _parts(run, {*by, *where}):
            if _matches(run.unit, where, part):
                place = tuple(value_of(run.unit, name, part) for name in by)
                found.setdefault(place, {}).setdefault(number, []).append(part)
    return {
        place: _cell([runs[i] for i in members], by, place, sum(members.values(), []))
        for place, members in _in_order(found, by)
    }


def places(runs: Sequence[Run], by: Sequence[str], where: Where | None = None) -> list[Place]:
    """The values that these fields have together, in the experiment's order."""
    where = where or {}
    found = {
        tuple(value_of(run.unit, name, part) for name in by): None
        for run in runs
        for part in _parts(run, {*by, *where})
        if _matches(run.unit, where, part)
    }
    return [place for place, _ in _in_order(found, by)]


def matching(runs: Sequence[Run], where: Where) -> list[Run]:
    """The runs that have, at least in part, these values."""
    return [run for run in runs if any(_matches(run.unit, where, p) for p in _parts(run, where))]


def value_of(unit: Mapping[str, Any], name: str, part: Part = (None, None)) -> Any:
    """A unit's value by the name that tables give it; None where it has none.

    The unedited model has no protocol and no settings: how often nothing is done does not matter.
    """
    if name in (RELATION, EDITS):
        return part[name == EDITS]
    if unit["method"] == UNEDITED and name.startswith(("protocol.", "settings.")):
        return None
    return _hashable(field_of(unit, {"editor": "label"}.get(name, name)))


def _matches(unit: Mapping[str, Any], where: Where, part: Part) -> bool:
    return all(value_of(unit, name, part) in _choices(wanted) for name, wanted in where.items())


def _parts(run: Run, fields: Collection[str]) -> Iterable[Part]:
    """The parts of a run that these fields tell apart."""
    relations: list[str | None] = [None]
    stages: list[int | None] = [None]
    if RELATION in fields:
        told = {case[RELATION] for case in run.row.cases if case.get(RELATION)} if run.row else ()
        relations = sorted(told)
    if EDITS in fields:
        stages = [_facts(run.row, point) for point in run.row.points] if run.row else []
    return product(relations, stages)


def _in_order(found: Mapping[Place, _T], by: Sequence[str]) -> list[tuple[Place, _T]]:
    """Field by field: as the experiment has them, but relations by name and stages by size."""
    ranks: list[dict[Any, int]] = []
    for position, name in enumerate(by):
        values = dict.fromkeys(place[position] for place in found)
        ordered = sorted(values) if name in (RELATION, EDITS) else values
        ranks.append({value: rank for rank, value in enumerate(ordered)})
    return sorted(
        found.items(), key=lambda one: [rank[v] for rank, v in zip(ranks, one[0], strict=True)]
    )


def _cell(runs: Sequence[Run], by: Sequence[str], place: Place, parts: Sequence[Part]) -> Cell:
    units = [flat(run.unit) for run in runs]
    differing = {
        name
        for name in set().union(*units) - {"seed"}
        if len({to_json(unit.get(name)) for unit in units}) > 1
    }
    relations, stages = {part[0] for part in parts}, {part[1] for part in parts}
    if len(stages) > 1:
        differing.add(EDITS)
    if differing:
        told = ", ".join(f"{name} = {text(value)}" for name, value in zip(by, place, strict=True))
        raise ConfigError(
            f"the runs with {told or 'nothing told apart'} also differ in "
            f"{', '.join(sorted(differing))}; an average would hide that. Name it among the "
            "fields, or choose with `where`."
        )
    only = frozenset(relation for relation in relations if relation is not None)
    return Cell(tuple(runs), only or None, stages.pop())


def text(value: Any) -> str:
    """A field's value for people."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        run = len(value) > 2 and all(isinstance(one, int) for one in value)
        if run and list(value) == list(range(value[0], value[-1] + 1)):
            return f"{value[0]}-{value[-1]}"
        return ", ".join(map(text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(value: Any) -> list[Any]:
    """What a field may be, as `where` says: the value itself or, of a list, any in it."""
    return [_hashable(value), *map(_hashable, value)] if isinstance(value, list) else [value]


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return to_json(value)
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _at(row: Row, edits: int) -> Mapping[str, Estimate]:
    """A stream's estimates after so many facts."""
    metrics = next(p["metrics"] for p in row.points if _facts(row, p) == edits)
    return {name: Estimate(*four) for name, four in metrics.items()}


def _costs(row: Row) -> dict[str, Estimate]:
    """COSTS and LEARNT of a run, as far as its record tells them."""
    fit, edits = row.record.get("fit", {}), row.record.get("edits", {})
    editing, peak = row.record.get("seconds", {}).get("editing"), row.record.get("peak_memory")
    told = {
        "parameters": edits.get("parameters"),
        "edit bytes": edits.get("bytes"),
        "edit seconds": editing and editing / edits.get("made", 1),
        "edit MB": peak and peak / 1e6,
        "fit steps": fit.get("notes", {}).get("training", {}).get("best"),
        "fit seconds": fit.get("seconds"),
        "fit MB": fit.get("peak_memory") and fit["peak_memory"] / 1e6,
    }
    found = {n: Estimate(v, math.nan, math.nan, 1) for n, v in told.items() if v is not None}
    for name in LEARNT:
        if four := fit.get("learnt", {}).get(name.removeprefix("fit ")):
            mean, low, high = (math.nan if value is None else value for value in four[:3])
            found[name] = Estimate(mean, low, high, four[3])
    return found


def _facts(row: Row, point: Mapping[str, Any]) -> int:
    """How many facts a stream had been asked to write, those that failed among them."""
    return min(int(point["batches"] * row.unit["batch"]), len(row.cases))


def _together(found: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Estimates of several runs as one, taken for independent of each other."""
    names = dict.fromkeys(name for estimates in found for name in estimates)
    return {name: _mean([one[name] for one in found if name in one]) for name in names}


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    k = len(estimates)
    mean = sum(e.mean for e in estimates) / k
    below = math.hypot(*(e.mean - e.low for e in estimates)) / k
    above = math.hypot(*(e.high - e.mean for e in estimates)) / k
    return Estimate(mean, mean - below, mean + above, sum(e.n for e in estimates))
