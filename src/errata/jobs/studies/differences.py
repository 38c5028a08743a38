"""How two cells differ in a metric: case by case where there are cases.

Both sides have answered the same cases, so what makes a case hard cancels. Metrics that cases
have are compared by `compare`. S, a harmonic mean of means, has no value for a case: its difference
is bootstrapped over cases, both sides drawing the same ones, and its p-value is of the permutation
test that swaps the two sides of a case. What only whole runs have, such as a point of a stream, is
compared as two independent estimates, without a p-value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from errata.errors import ConfigError
from errata.jobs.studies.cells import Cell, Place, Run, cells
from errata.jobs.studies.compare import compare
from errata.jobs.studies.shown import Where
from errata.measure.metrics import Estimate
from errata.measure.score import HARMONIC

Columns = NDArray[np.float64]
"""(n, k): cases by the scores that a harmonic mean is of; NaN where a case has none."""

DRAWS = 5_000
"""Of the bootstrap and of the permutation test of a harmonic mean."""


@dataclass(frozen=True)
class Difference:
    """One metric of two cells."""

    first: float
    """The first cell's mean over the cases that both have."""
    second: float
    estimate: Estimate
    """first - second, with its 95% interval; n is the number of cases."""
    p: float | None
    """Of the two-sided permutation test; None where there are no cases to permute."""


def difference(first: Cell, second: Cell, metric: str, *, seed: int = 0) -> Difference | None:
    """Compare two cells; None where one has not measured the metric, or they share no case.

    Args:
        first: the one that is subtracted from.
        second: the other.
        metric: a name in their summaries.
        seed: of all random draws.
    """
    one, other = first.summary.get(metric), second.summary.get(metric)
    if one is None or other is None:
        return None
    if first.edits is None and second.edits is None:
        if parts := HARMONIC.get(metric):
            return _of_harmonic_means(first, second, parts, seed)
        if any(metric in case for case in first.cases.values()):
            try:
                found = compare(first.done, second.done, metric, matched=(), seed=seed)
            except ConfigError:  # no case in common
                return None
            return Difference(found.first, found.second, found.difference, found.p)
    half = math.hypot(one.high - one.low, other.high - other.low) / 2
    mean = one.mean - other.mean
    estimate = Estimate(mean, mean - half, mean + half, min(one.n, other.n))
    return Difference(one.mean, other.mean, estimate, None)


def _of_harmonic_means(
    first: Cell, second: Cell, parts: Sequence[str], seed: int
) -> Difference | None:
    same_data = first.runs[0].unit["data"] == second.runs[0].unit["data"]
    shared = sorted(first.cases.keys() & second.cases.keys()) if same_data else []
    if not shared:
        return None
    a, b = (
        np.array([[cell.cases[case].get(part, math.nan) for part in parts] for case in shared])
        for cell in (first, second)
    )
    n, random = len(shared), np.random.default_rng(seed)
    every = np.ones((1, n))
    mean = float((_harmonic(every, a) - _harmonic(every, b))[0])
    drawn = random.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
    low, high = np.nanquantile(_harmonic(drawn, a) - _harmonic(drawn, b), (0.025, 0.975))
    kept = random.integers(2, size=(DRAWS, n)).astype(float)
    swapped = _harmonic(kept, a, 1 - kept, b) - _harmonic(kept, b, 1 - kept, a)
    p = (1 + int((np.abs(swapped) >= abs(mean) - 1e-12).sum())) / (1 + DRAWS)
    return Difference(
        first=float(_harmonic(every, a)[0]),
        second=float(_harmonic(every, b)[0]),
        estimate=Estimate(mean, float(low), float(high), n),
        p=p,
    )


def _harmonic(weights: Columns, values: Columns, *more: Columns) -> NDArray[np.float64]:
    """(draws, n) weights of cases and their (n, k) values, and more such pairs -> (draws,)."""
    pairs = [(weights, values), *zip(more[::2], more[1::2], strict=True)]
    sums = sum(w @ np.nan_to_num(v) for w, v in pairs)
    counts = sum(w @ (~np.isnan(v)).astype(float) for w, v in pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.asarray(sums) / counts
        return np.asarray(values.shape[1] / (1 / means).sum(axis=1))


@dataclass(frozen=True)
class Compared:
    """Two editors in one place, by metric."""

    place: Place
    differences: dict[str, Difference | None]


def compared(
    runs: Sequence[Run],
    first: str,
    second: str,
    metrics: Sequence[str],
    by: Sequence[str],
    where: Where | None = None,
) -> list[Compared]:
    """Two editors, wherever both have worked.

    Args:
        runs: of an experiment.
        first: an editor's label.
        second: another's.
        metrics: what to compare.
        by: the fields that tell an editor's runs apart.
        where: only these.

    Raises:
        ConfigError: the experiment has no such editor, or the two nowhere did the same.
    """
    labels = dict.fromkeys(run.unit["label"] for run in runs)
    for name in (first, second):
        if name not in labels:
            raise ConfigError(f"there is no editor {name!r}; there are {', '.join(labels)}.")
    ours, theirs = (cells(runs, by, {**(where or {}), "editor": name}) for name in (first, second))
    places = [place for place in ours if place in theirs]
    if not places:
        raise ConfigError(f"{first!r} and {second!r} were nowhere asked to do the same.")
    return [
        Compared(place, {m: difference(ours[place], theirs[place], m) for m in metrics})
        for place in places
    ]
