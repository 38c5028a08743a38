"""Locating against editing: the statistics against plain code, the study on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression

from errata.errors import ConfigError, RequestError
from errata.jobs.locating import locate as job
from errata.jobs.locating.pictures import against_edits
from errata.jobs.locating.regressions import MODELS, Located, added, correlation, explained, table
from errata.jobs.locating.report import render, versus_rows
from errata.jobs.locating.versus import Versus, largest, versus
from errata.lm.load import LanguageModel
from errata.locate.tracing import Skipped, trace
from errata.requests import Request
from tests.conftest import CAPITALS, SENTENCES, TEMPLATES, WORKING, statements

REQUEST = Request("{} is", "A", "b", "c")
LAYERS = 4


def made_up(facts: int = 12, seed: int = 0, *, informed: float = 0.0) -> list[Located]:
    """Facts whose scores follow the layer, noise and, as far as `informed`, MLP tracing."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(facts):
        state, mlp, saliency = random.random((3, LAYERS))
        by_layer = np.array([0.9, 0.7, 0.4, 0.1])
        score = by_layer + informed * mlp + 0.05 * random.standard_normal(LAYERS)
        a, b, c, d = (tuple(x.tolist()) for x in (state, mlp, 1e-5 * saliency, score))
        found.append(Located(REQUEST, a, b, c, d, (False,) * LAYERS))
    return found


def study(facts: list[Located]) -> Versus:
    skipped = [Skipped(REQUEST, "d", "it says d.")]
    return Versus.of(
        model="m", method="rome", window=3, layers=range(LAYERS), facts=facts, skipped=skipped
    )


def test_correlation_is_pearson_with_fishers_interval() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 30))
    r, low, high, n = correlation(x, x + y)
    plain = stats.pearsonr(x, x + y)
    assert r == pytest.approx(plain.statistic) and n == 30
    assert (low, high) == pytest.approx(tuple(plain.confidence_interval(0.95)))


def test_correlation_of_what_does_not_vary_is_unknown() -> None:
    r, low, high, n = correlation(np.ones(5), np.arange(5.0))
    assert math.isnan(r) and math.isnan(low) and math.isnan(high) and n == 5


@pytest.mark.parametrize("features", MODELS, ids="+".join)
def test_explained_is_the_regressions_r_squared(features: tuple[str, ...]) -> None:
    facts = made_up(informed=0.3)
    columns = []
    for name in features:
        if name == "layer":
            columns.append(np.tile(np.eye(LAYERS), (len(facts), 1)))
        else:
            columns.append(table(facts, name).reshape(-1, 1))
    x, y = np.concatenate(columns, axis=1), table(facts, "score").ravel()
    wanted = LinearRegression().fit(x, y).score(x, y)
    r2, low, high, n = explained(facts, features)
    assert r2 == pytest.approx(wanted, abs=1e-9)
    assert low <= r2 <= high or "layer" not in features  # R² of noise is biased upwards
    assert n == len(facts) * LAYERS


def test_what_tracing_adds_is_seen_where_there_is_something() -> None:
    by = {one.features: one.r2.mean for one in study(made_up(40, informed=0.5)).explained}
    assert by["layer", "mlp"] - by["layer",] > 0.1
    by = {one.features: one.r2.mean for one in study(made_up(40)).explained}
    assert by["layer", "mlp"] - by["layer",] < 0.01


def test_what_tracing_adds_is_the_difference_of_the_regressions() -> None:
    facts = made_up(40, informed=0.5)
    more = added(facts, "mlp")
    both, alone = explained(facts, ("layer", "mlp")), explained(facts, ("layer",))
    assert more.mean == pytest.approx(both.mean - alone.mean) and more.low > 0
    # Of the same samples: narrower than the regressions' own intervals.
    assert more.high - more.low < both.high - alone.low


def test_scores_that_do_not_vary_explain_nothing() -> None:
    two = (0.1, 0.2)
    flat = [Located(REQUEST, two, two, two, (0.5, 0.5), (False, False)) for _ in range(3)]
    assert math.isnan(explained(flat, ("layer",)).mean)


def test_a_study_is_read_back_drawn_and_told(tmp_path: Path) -> None:
    found = study(made_up())
    back = job.load(job.save(found, tmp_path / "versus.json"))
    assert back == found
    assert len(against_edits(found).axes) == 3
    (_, _, explained_rows), (_, _, layer_rows) = versus_rows(found)
    assert [row[0] for row in explained_rows][:2] == ["layer", "tracing effect, state"]
    assert len(layer_rows) == LAYERS and "it says d." in render(found)


@pytest.fixture(scope="module")
def trained(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def facts(count: int) -> list[Request]:
    names = list(CAPITALS)
    return [
        Request(TEMPLATES[0], name, CAPITALS[names[i - 1]], CAPITALS[name])
        for i, name in enumerate(names[:count])
    ]


TEXT = [*SENTENCES, *statements()]


def test_each_known_fact_is_traced_weighed_and_edited_in_each_layer(
    trained: LanguageModel,
) -> None:
    before = {name: value.clone() for name, value in trained.network.state_dict().items()}
    wrong = Request(TEMPLATES[0], "Spain", "Cairo", "Lima")
    requests = [*facts(2), wrong]
    settings = {key: value for key, value in WORKING.items() if key != "layers"}
    found = versus(
        trained, requests, method="memit", settings=settings, layers=[0, 3], window=2, corpus=TEXT
    )
    assert [fact.request for fact in found.facts] == requests[:2]
    assert [one.request for one in found.skipped] == [wrong]
    assert found.layers == (0, 3)
    one = found.facts[0]
    # At the last block the subject's token can no longer reach the answer.
    assert one.score[0] > 0.1 and one.score[1] == 0 and one.failed == (False, True)
    # There, restoring the last token restores everything.
    alone = trace(trained, requests[0], kind="state", answer="Paris")
    assert largest(alone)[3] == pytest.approx(alone.total_effect, abs=1e-5)
    after = trained.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_bad_input_is_refused(trained: LanguageModel) -> None:
    with pytest.raises(RequestError, match="knows 1 of the 1"):
        versus(trained, facts(1), window=1, layers=[0], corpus=TEXT)
    with pytest.raises(ConfigError, match="rom"):
        versus(trained, facts(2), method="rom", window=1, corpus=TEXT)
    with pytest.raises(ConfigError, match="blocks 0 to 3, not 7"):
        versus(trained, facts(2), layers=[7], corpus=TEXT)
