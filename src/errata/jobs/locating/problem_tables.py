"""What the study of five editing problems found, as tables."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from errata.jobs.locating.numbers import estimate, number
from errata.jobs.locating.problems import Problems
from errata.jobs.locating.regressions import added, table
from errata.measure.metrics import Estimate, interval

Rows = tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]
"""A table's title, columns and rows."""


def problem_rows(found: Problems) -> list[Rows]:
    """The study's tables: what tracing explains; the best layers; each score by layer."""
    told, best = [], []
    for study in found.studies:
        by = {one.features: one.r2 for one in study.explained}
        name = (study.variant, study.method)
        told.append(
            (
                *name,
                str(len(study.facts)),
                estimate(by["layer",], 3),
                estimate(by["mlp",], 3),
                estimate(added(study.facts, "mlp"), 3),
                estimate(added(study.facts, "state"), 3),
            )
        )
        scores = table(study.facts, "score").mean(axis=0)
        top = int(scores.argmax())
        traced = study.layers[int(table(study.facts, "mlp").mean(axis=0).argmax())]
        means = (
            estimate(_mean(table(study.facts, key)[:, top]))
            for key in ("score", "paraphrase", "neighbour", "overall")
        )
        best.append((*name, str(study.layers[top]), str(traced), *means))
    return [
        (
            "Variance of the rewrite score explained",
            ("problem", "method", "facts", "R², layer", "R², MLPs", "MLPs add", "states add"),
            tuple(told),
        ),
        (
            "At the best layer for the rewrite score",
            (
                "problem",
                "method",
                "layer",
                "traced to",
                "rewrite",
                "paraphrase",
                "neighbour",
                "all",
            ),
            tuple(best),
        ),
        *(_by_layer(found, key, title) for key, title in _SCORES.items()),
    ]


_SCORES = {"score": "Rewrite score by layer", "overall": "Overall score by layer"}


def _by_layer(found: Problems, key: str, title: str) -> Rows:
    rows = tuple(
        (
            study.variant,
            study.method,
            *(number(_mean(column).mean) for column in table(study.facts, key).T),
        )
        for study in found.studies
    )
    layers = tuple(map(str, found.studies[0].layers))
    return title, ("problem", "method", *layers), rows


def _mean(values: NDArray[np.float64]) -> Estimate:
    """Over the facts that have the score."""
    there = values[~np.isnan(values)]
    if not len(there):
        return Estimate(math.nan, math.nan, math.nan, 0)
    return interval(there, within=(0.0, 1.0))
