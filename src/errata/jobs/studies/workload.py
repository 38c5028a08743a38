"""How much work units are, counted: facts, edits, targets, scores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from errata.editors.closed_form.config import ClosedFormConfig
from errata.jobs.cases import sample_cases
from errata.jobs.studies.scoring import texts_wanted
from errata.jobs.studies.units import UNEDITED, Unit, config_of


@dataclass(frozen=True)
class Work:
    """What units do, counted."""

    facts: int = 0
    """Written."""
    edits: int = 0
    """Made: one for each batch."""
    scored: int = 0
    """Cases that are scored; a stream scores each again and again."""
    points: int = 0
    """Of streams: each measures drift too."""
    texts: int = 0
    """Cases that free text is written about."""
    targets: int = 0
    """Found: those that an earlier unit has found are not counted again."""

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(
            self.facts + other.facts,
            self.edits + other.edits,
            self.scored + other.scored,
            self.points + other.points,
            self.texts + other.texts,
            self.targets + other.targets,
        )


@dataclass(frozen=True)
class Rates:
    """What each kind of work takes, in seconds."""

    target: float
    """One fact's: for a method that looks for none, all of its edit."""
    edit: float
    """What is left of an edit of one fact, once its target is known."""
    scored: float
    point: float
    text: float

    def of(self, work: Work) -> float:
        """Seconds of some work."""
        return (
            work.targets * self.target
            + work.edits * self.edit
            + work.scored * self.scored
            + work.points * self.point
            + work.texts * self.text
        )


def work_of(unit: Unit, cases: int) -> Work:
    """What a unit does with so many cases, if no other has found its targets."""
    texts = texts_wanted(unit, cases)
    if unit.method == UNEDITED:
        return Work(scored=cases, texts=texts)
    batches = ceil(cases / unit.batch)
    if unit.protocol != "sequential":
        return Work(cases, batches, cases, 0, texts, cases)
    seen = [min(cases, k * unit.batch) for k in range(1, batches + 1)]
    points = seen[unit.every - 1 :: unit.every]
    points += seen[-1:] if batches % unit.every else []
    return Work(cases, batches, cases + sum(points), len(points), texts, cases)


def total(units: Sequence[Unit]) -> Work:
    """What units do together, one after another in one process."""
    sources = {unit.data for unit in units if unit.count is None}
    sizes = {data: len(sample_cases(data, None, 0)) for data in sources}
    done, found = Work(), set()
    for unit in units:
        work = work_of(unit, unit.count or sizes[unit.data])
        if (targets := _targets(unit)) is not None:
            work = replace(work, targets=0) if targets in found else work
            found.add(targets)
        done += work
    return done


def _targets(unit: Unit) -> Hashable:
    """What a unit's targets depend on, beside the model; None if they cannot be shared."""
    if unit.method == UNEDITED or unit.protocol == "sequential":
        return None
    config = config_of(unit)
    if not isinstance(config, ClosedFormConfig) or (config.one_at_a_time and unit.batch > 1):
        return None
    sample = unit.data, unit.count, unit.seed, config.seed
    place = config.layers[-1:] or unit.method
    return sample, place, config.target, config.prefixes, config.contexts
