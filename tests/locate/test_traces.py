from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from errata.errors import DatasetError
from errata.locate.tracing import AverageEffect, Trace, average, trace
from tests.locate.planted import planted, request


def test_averages_by_class_of_token() -> None:
    base = trace(planted(), request(), kind="mlp", window=1)

    def made(tokens: int, subject: tuple[int, int], effects: list[float]) -> Trace:
        rows = tuple((0.1 + e, 0.1 + 2 * e) for e in effects)
        names = tuple(map(str, range(tokens)))
        return replace(
            base, tokens=names, subject=subject, corrupted=0.1, clean=0.9, probabilities=rows
        )

    long = made(8, (1, 4), [9, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8])
    short = made(2, (0, 0), [0.3, 0.2])
    last = made(1, (0, 0), [0.5])
    found = average([long, short, last])
    assert (found.kind, found.window, found.model) == ("mlp", 1, "planted")
    assert np.allclose((found.clean, found.corrupted), (0.9, 0.1))
    assert [row[0] for row in found.n] == [3, 1, 3, 2, 1, 3]
    first = [0.1, 0.3, 0.5]
    means = np.array([0.3, 0.3, 1.3 / 3, 0.4, 0.7, 0.5])
    assert np.allclose([row[0] for row in found.mean], means)
    assert np.allclose([row[1] for row in found.mean], 2 * means)
    half = 1.96 * np.std(first, ddof=1) / 3**0.5
    assert found.low[0][0] == pytest.approx(0.3 - half)
    assert found.high[0][0] == pytest.approx(0.3 + half)
    assert math.isnan(found.low[1][0]) and math.isnan(average([last]).mean[1][0])
    record = found.to_dict()
    assert record["low"][1] == [None, None]
    again = AverageEffect.from_dict(json.loads(json.dumps(record, allow_nan=False)))
    assert again.to_dict() == record and again.mean == found.mean


def test_what_cannot_be_averaged() -> None:
    lm = planted()
    with pytest.raises(DatasetError, match="no trace"):
        average([])
    with pytest.raises(DatasetError, match="different kinds"):
        average([trace(lm, request()), trace(lm, request(), kind="mlp")])
    record = trace(lm, request()).to_dict()
    del record["level"]
    with pytest.raises(DatasetError, match=r"lacks \['level'\]"):
        Trace.from_dict(record)
