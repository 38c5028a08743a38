from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from errata.errors import ConfigError, NotFiniteError, RequestError, TokenizationError
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode_requests
from errata.locate.restoration import around
from errata.locate.tracing import (
    Noise,
    Trace,
    Traces,
    average,
    embedding_spread,
    trace,
    trace_all,
)
from errata.requests import Request
from tests.lm.families import tiny_lm
from tests.locate.plain import plain
from tests.locate.planted import FACTS, LAYERS, PROMPT, STRANGER, planted, request

REQUEST = Request("The {} flows to", "Nile Ben", "Rome")
FAMILIES = (
    "gpt2",
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "opt",
    "opt-350m",
    "llama",
    "mistral-sliding",
    "gemma2-sliding",
    "phi3",
)
WAYS: tuple[dict[str, Any], ...] = (
    {"kind": "state"},
    {"kind": "mlp", "window": 3},
    {"kind": "attention", "window": 2},
    {"kind": "state", "severed": "mlp"},
    {"kind": "state", "severed": "attention"},
)


def agree(lm: LanguageModel, found: Trace, **how: Any) -> None:
    noise = replace(found.noise, unit="absolute", scale=found.level)
    clean, corrupted, grid = plain(lm, found.request, noise, kind=found.kind, **how)
    close: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}
    assert_close(found.clean, clean, **close)
    assert_close(found.corrupted, corrupted, **close)
    assert_close(torch.tensor(found.probabilities, dtype=torch.float64), grid, **close)
    assert (grid - corrupted).abs().max() > 1e-3 * clean  # something was restored


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_full_pass_for_each_place(family: str) -> None:
    lm = tiny_lm(family)
    noise = Noise(samples=3)
    for way in WAYS:
        found = trace(lm, REQUEST, noise=noise, **way)
        agree(lm, found, window=way.get("window", 1), severed=way.get("severed"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("noise", "answer"),
    [
        (Noise(samples=2, replace=True), None),
        (Noise(0.3, "absolute", "uniform", samples=3, seed=7), None),
        (Noise(samples=2), "Danube Sea"),
        (Noise(samples=2, replace=True), "R"),
    ],
)
def test_other_noise_and_answers_of_several_tokens(
    family: str, noise: Noise, answer: str | None
) -> None:
    lm = tiny_lm(family, kind="bytes-bos")
    for way in WAYS[1:4]:
        found = trace(lm, REQUEST, noise=noise, answer=answer, **way)
        agree(lm, found, window=way.get("window", 1), severed=way.get("severed"), answer=answer)
        assert found.tokens[0] == "<s>" and found.subject[0] > 1


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("prompt", ["{}", "the {}", "{} is"])
def test_subjects_anywhere_in_the_prompt(family: str, prompt: str) -> None:
    lm = tiny_lm(family)
    for subject in ("a", "Hamlet"):
        for way in WAYS[:4]:
            found = trace(lm, Request(prompt, subject, "x"), noise=Noise(0.3, "absolute"), **way)
            agree(lm, found, window=way.get("window", 1), severed=way.get("severed"))
    assert len(trace(lm, Request("{}", "a", "x")).tokens) == 1


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, noise = tiny_lm("llama"), Noise(samples=5)
    whole = trace(lm, REQUEST, kind="mlp", window=2, noise=noise)
    monkeypatch.setattr("errata.locate.restoration._PADDING", 10**6)
    for batch_tokens in (1, 30, 150, 4096):
        parts = trace(lm, REQUEST, kind="mlp", window=2, noise=noise, batch_tokens=batch_tokens)
        assert_close(parts.probabilities, whole.probabilities, atol=1e-8, rtol=1e-5)
        assert_close(parts.corrupted, whole.corrupted, atol=1e-8, rtol=1e-5)


def test_batch_tokens_bounds_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sizes = tiny_lm(), []
    lm.network.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trace(lm, REQUEST, noise=Noise(samples=40), batch_tokens=100)
    assert 50 < max(sizes) <= 100


def test_the_model_is_left_as_it_was() -> None:
    lm = tiny_lm()
    before = {name: value.clone() for name, value in lm.network.state_dict().items()}
    trace_all(lm, [REQUEST], noise=Noise(samples=2))
    assert all(torch.equal(value, before[name]) for name, value in lm.network.state_dict().items())
    for module in lm.network.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("layer", range(LAYERS - 1))
@pytest.mark.parametrize("subject", ["Ada Bell", "Juna Kern"])
def test_a_planted_fact_is_found(layer: int, subject: str) -> None:
    lm = planted(layer)
    first, last, end = 3, 4, 5
    mlps = trace(lm, request(subject), kind="mlp", window=1)
    assert (mlps.subject, mlps.answer, mlps.predicted) == ((first, last), *(FACTS[subject],) * 2)
    assert mlps.clean > 0.95 and mlps.corrupted < 0.1
    effects = torch.tensor(mlps.effects)
    assert effects[last, layer] > 0.9 * mlps.total_effect
    effects[last, layer] = 0
    assert effects.abs().max() < 1e-6

    states = torch.tensor(trace(lm, request(subject)).effects)
    assert states[last, :-1].min() > 0.9 * mlps.total_effect  # until attention moves it
    assert states[last, -1].abs() < 1e-6
    assert states[end, :-1].abs().max() < 1e-6
    assert_close(states[end, -1].item(), mlps.total_effect, atol=1e-6, rtol=0)
    assert states[:last].abs().max() < 0.1

    severed = torch.tensor(trace(lm, request(subject), severed="mlp").effects)
    assert severed[last, :layer].abs().sum() < 0.1 * layer + 1e-9  # the fact is not looked up
    assert_close(severed[last, layer:], states[last, layer:])


def test_windows_hold_their_layers() -> None:
    assert [around(layer, 1, 4) for layer in (0, 3)] == [range(0, 1), range(3, 4)]
    assert [around(layer, 4, 8) for layer in (0, 4, 7)] == [range(0, 2), range(2, 6), range(5, 8)]
    assert around(1, 3, 4) == range(0, 3) and around(2, 10, 4) == range(0, 4)
    lm = planted(2)
    effects = trace(lm, request(), kind="mlp", window=3).effects[4]
    assert [effect > 0.5 for effect in effects] == [False, True, True, True, False]


def test_tokens_before_the_subject_do_nothing() -> None:
    lm = tiny_lm()
    for way in WAYS:
        found = trace(lm, REQUEST, noise=Noise(samples=2), **way)
        assert set(found.probabilities[0]) == {found.corrupted}


def test_noise_is_the_reference_code_s() -> None:
    drawn = np.random.RandomState(1).randn(10, 2, 3)
    assert np.array_equal(Noise().draw(2, 3), drawn)
    uniform = Noise(distribution="uniform", seed=3, samples=2000).draw(1, 4)
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() <= 1 and uniform.shape[0] == 2000


def test_more_noise_or_another_seed_is_another_run() -> None:
    lm = planted()
    asked = request()
    weak = trace(lm, asked, noise=Noise(0.1))
    assert weak.corrupted > 0.9 and trace(lm, asked).corrupted < 0.1
    assert trace(lm, asked, noise=Noise(seed=2)).corrupted != trace(lm, asked).corrupted
    assert trace(lm, asked) == trace(lm, asked)
    assert trace(lm, asked, spread=0.1).level == pytest.approx(0.3)
    assert trace(lm, asked, noise=Noise(0.5, "absolute"), spread=9.0).level == 0.5


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])  # Gemma's embedding scales
def test_spread_of_embeddings(family: str) -> None:
    lm = tiny_lm(family, kind="bytes-bos")
    subjects = ["Nile", "Big Ben"]
    rows = encode_requests(lm, [Request("{}", s, s) for s in subjects], target=False)
    entries = torch.cat([lm.embedding(torch.tensor(row.ids[1:])).detach() for row in rows])
    assert embedding_spread(lm, subjects) == pytest.approx(float(entries.std()), rel=1e-5)
    found = trace_all(lm, [Request("{} is", s, s) for s in subjects], kinds=["state"])
    assert found.traces[0].level == found.traces[1].level
    assert found.traces[0].level == pytest.approx(3 * float(entries.std()), rel=1e-5)


def test_facts_that_the_model_does_not_know_are_skipped() -> None:
    lm = planted()
    unknown = Request(PROMPT, STRANGER, "Rome", "Lima")
    told: list[tuple[str, int, int]] = []
    found = trace_all(
        lm,
        [request("Ada Bell"), unknown, request("Carl Dorn")],
        kinds=("mlp", "state"),
        window=1,
        progress=lambda *step: told.append(step),
    )
    assert [(t.request.subject, t.kind) for t in found.traces] == [
        (name, kind) for name in ("Ada Bell", "Carl Dorn") for kind in ("mlp", "state")
    ]
    (skipped,) = found.skipped
    assert skipped.request == unknown and skipped.predicted == "<end>"
    assert "'<end>', not 'Lima'" in skipped.why and STRANGER in skipped.why
    assert told == [("tracing", done, 3) for done in range(4)]
    effect = average([t for t in found.traces if t.kind == "mlp"])
    assert effect.n[2] == (2,) * LAYERS and effect.mean[2][2] > 0.8
    assert Traces.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_answers_of_several_tokens_must_be_known_in_full() -> None:
    lm = planted()  # once begun, it goes on to repeat the answer
    known, unknown = (Request(PROMPT, "Ada Bell", "x", true) for true in ("Rome Rome", "Rome Lima"))
    found = trace_all(lm, [known, unknown], kinds=["mlp"], window=1)
    (traced,), (skipped,) = found.traces, found.skipped
    assert traced.answer == "Rome Rome" and skipped.predicted == "Rome Rome"
    single = trace(lm, known, kind="mlp", window=1)
    assert 0.9 * single.clean < traced.clean < single.clean
    assert traced.effects[4][2] > 0.9 * traced.total_effect


def test_without_a_true_answer_the_model_s_own_is_traced() -> None:
    found = trace_all(planted(), [Request(PROMPT, "Ada Bell", "x")], kinds=["state"])
    assert found.traces[0].answer == "Rome" and not found.skipped
    assert trace(planted(), request(), answer=" Lima").answer == "Lima"


def test_bad_settings_are_refused() -> None:
    lm = planted()
    for bad, words in (
        ({"kind": "layer"}, "state, mlp, attention"),
        ({"window": 0}, "at least one layer"),
        ({"severed": "block"}, "'mlp' or 'attention'"),
        ({"kind": "mlp", "severed": "mlp"}, "kind 'state' alone"),
    ):
        with pytest.raises(ConfigError, match=words):
            trace(lm, request(), **bad)
    for wrong in (
        {"scale": 0.0},
        {"scale": math.nan},
        {"samples": 0},
        {"seed": -1},
        {"unit": "nu"},
        {"distribution": "t"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong)).rstrip("s")):
            Noise(**wrong)
    with pytest.raises(ConfigError, match="state, mlp, attention"):
        trace_all(lm, [request()], kinds=[])


def test_bad_requests_are_refused() -> None:
    lm = planted()
    with pytest.raises(RequestError, match="no request"):
        trace_all(lm, [])
    with pytest.raises(RequestError, match="no subject"):
        embedding_spread(lm, [])
    with pytest.raises(RequestError, match="non-empty"):
        trace(lm, request(), answer="  ")
    with pytest.raises(TokenizationError, match="longer than"):
        trace(lm, request(), answer="Rome " * 40)
    with pytest.raises(RequestError, match="does not occur"):
        Request.parse("the birthplace of him is", "Ada Bell", "Rome")


def test_weights_that_are_not_numbers_are_named() -> None:
    for path in ("mlp_out", "embedding"):
        lm = planted()
        module = lm.embedding if path == "embedding" else lm.mlp_out(1)
        with torch.no_grad():
            module.weight.fill_(math.nan)  # type: ignore[operator]
        name = next(n for n, p in lm.network.named_parameters() if p is module.weight)
        with pytest.raises(NotFiniteError, match=name):
            trace(lm, request())
        with pytest.raises(NotFiniteError, match=name):
            trace_all(lm, [request()])


def test_only_decoders_are_traced() -> None:
    for family in ("bert", "t5"):
        lm = tiny_lm(family)
        with pytest.raises(ConfigError, match="causal tracing needs a decoder"):
            trace(lm, REQUEST)
        with pytest.raises(ConfigError, match="causal tracing needs a decoder"):
            trace_all(lm, [REQUEST])


def test_the_reference_trace(shared: Path) -> None:
    """../shared/parity: the reference repository's code on its first request."""
    folder = shared / "parity"
    if not folder.exists():
        pytest.skip("../shared/parity is absent")
    lm = LanguageModel.load(folder / "model", dtype="float32")
    record = json.loads((folder / "requests.json").read_text())[0]
    asked = Request(record["template"], record["subject"], record["new"], record["true"])
    expected = load_file(folder / "trace.safetensors")
    noise = Noise(0.1, "absolute")
    found = trace_all(lm, [asked], window=4, noise=noise)
    for result, name in zip(found.traces, ("state", "mlp", "attn"), strict=True):
        assert abs(result.clean - expected["0.high"]) < 1e-5
        assert abs(result.corrupted - expected["0.low"]) < 1e-5
        assert_close(torch.tensor(result.probabilities), expected[f"0.{name}"], atol=1e-5, rtol=0)
