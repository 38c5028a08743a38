"""Growing: deterministic, resumable, whole files, and a model that Transformers loads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from errata.errors import GrowError
from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.grow import grow, main
from errata.pocket.knowledge import load, measure, says
from errata.pocket.lessons import LESSONS, Windows, descend_windows, quick_in_bfloat16
from errata.pocket.shapes import SHAPES, GrowConfig, make_tokenizer, recipe
from errata.pocket.training import CHECKPOINT, Report

TINY = GrowConfig(
    steps=6, layers=2, width=32, heads=2, vocabulary=600, positions=64, window=24, batch=4
)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Encyclopedia:
    """Six countries."""
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    capitals = {
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Peru": "Lima",
        "Chile": "Santiago",
        "Egypt": "Cairo",
    }
    rows = [
        {"subject": subject, "kind": "country", "facts": {"capital": capital}}
        for subject, capital in capitals.items()
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return Encyclopedia.read(path)


GROWN = [name for name, shape in SHAPES.items() if shape.base is None]


@pytest.mark.parametrize("model", GROWN)
def test_a_grown_model_loads_and_is_measured(model: str, few: Encyclopedia, tmp_path: Path) -> None:
    reports: list[Report] = []
    out = grow(replace(TINY, model=model), few, tmp_path / "model", progress=reports.append)
    training = [report for report in reports if report.stage == "growing"]
    assert [report.step for report in training] == [1, 2, 3, 4, 5, 6]
    assert all(report.loss > 0 and report.tokens_per_second > 0 for report in training)
    network, tokenizer = load(out)
    assert network.dtype == torch.float32
    assert next(iter(load_file(out / "model.safetensors").values())).dtype == torch.float16
    text = tokenizer.decode(tokenizer("Perú is ☃ {}.")["input_ids"], skip_special_tokens=True)
    assert isinstance(text, str) and text.strip() == "Perú is ☃ {}."
    around = {"pocket": (0, 0), "pocket-llama": (1, 0), "pocket-bert": (1, 1), "pocket-t5": (0, 1)}
    marks = tokenizer.get_special_tokens_mask(
        tokenizer("Peru")["input_ids"], already_has_special_tokens=True
    )
    assert (marks[0], marks[-1]) == around[model]
    shares = measure(network, tokenizer, few).shares
    assert set(shares) == {"all", "capital"}
    assert "| capital |" in (out / "README.md").read_text(encoding="utf-8")
    assert not list(out.glob("*checkpoint*"))


@pytest.mark.parametrize("model", ("pocket", "pocket-bert", "pocket-t5"))
def test_a_stopped_run_continues_as_if_it_had_not_been(
    model: str, few: Encyclopedia, tmp_path: Path
) -> None:
    tiny = replace(TINY, model=model)
    whole = grow(tiny, few, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(report: Report) -> None:
        if report.step == 4:
            raise Stopped

    config = replace(tiny, checkpoint_seconds=1e-9)
    with pytest.raises(Stopped):
        grow(config, few, tmp_path / "part", progress=stop)
    # The step that was not saved is done again.
    steps: list[int] = []
    part = grow(
        config, few, tmp_path / "part", progress=lambda r: steps.append(r.step), resume=True
    )
    assert steps[0] == 4
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, part))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_finished_run_may_go_on_for_longer(few: Encyclopedia, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    grow(TINY, few, tmp_path / "a", checkpoints=kept)
    steps: list[int] = []
    longer = replace(TINY, steps=8)
    grow(
        longer,
        few,
        tmp_path / "a",
        checkpoints=kept,
        resume=True,
        progress=lambda r: steps.append(r.step) if r.stage == "growing" else None,
    )
    assert steps == [7, 8]


def test_another_runs_checkpoint_is_refused(few: Encyclopedia, tmp_path: Path) -> None:
    grow(TINY, few, tmp_path / "a", checkpoints=tmp_path)
    with pytest.raises(GrowError, match="seed"):
        grow(replace(TINY, seed=1), few, tmp_path / "a", checkpoints=tmp_path, resume=True)


def test_a_checkpoint_cut_short_is_refused(few: Encyclopedia, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"\x00" * 20)
    with pytest.raises(GrowError, match="cannot continue"):
        grow(TINY, few, tmp_path, resume=True)


def test_windows_depend_on_seed_and_step_alone(few: Encyclopedia) -> None:
    windows = Windows(few, TINY)
    tokenizer = make_tokenizer(windows.texts(), TINY)
    first = windows.batch(tokenizer, 5)
    assert first.shape == (TINY.batch, TINY.window + 1)
    assert torch.equal(first, windows.batch(tokenizer, 5))
    assert not torch.equal(first, windows.batch(tokenizer, 6))
    many = torch.cat([windows.batch(tokenizer, step) for step in range(50)])
    assert 0.2 < float((many[:, 0] == 0).float().mean()) < 0.4


@pytest.mark.parametrize("model", GROWN)
def test_the_tokenizer_is_the_same_every_time(model: str, few: Encyclopedia) -> None:
    config = replace(TINY, model=model)
    first, second = (
        make_tokenizer(LESSONS[model](few, config).texts(), config).backend_tokenizer.to_str()
        for _ in range(2)
    )
    assert first == second


def test_gradients_are_those_of_the_mean_loss(few: Encyclopedia) -> None:
    torch.manual_seed(0)
    network = SHAPES["pocket"].network(replace(TINY, batch=64), 300)
    batch = torch.randint(0, 300, (64, 25))
    loss = descend_windows(network, batch)
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    half = quick_in_bfloat16(batch.device)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        whole = network(input_ids=batch[:, :-1]).logits.float()
    expected = torch.nn.functional.cross_entropy(whole.flatten(0, 1), batch[:, 1:].flatten())
    torch.autograd.backward(expected)
    assert math.isclose(loss, float(expected.detach()), rel_tol=1e-3)
    for gradient, parameter in zip(found, network.parameters(), strict=True):
        assert parameter.grad is not None
        assert (gradient - parameter.grad).norm() < 0.03 * parameter.grad.norm()


def test_says_agrees_with_greedy_generation(few: Encyclopedia) -> None:
    config = replace(TINY, model="pocket-llama")
    tokenizer = make_tokenizer(Windows(few, config).texts(), config)
    torch.manual_seed(1)
    network = SHAPES["pocket-llama"].network(config, len(tokenizer)).eval()
    prompts = ("The capital of Peru is", "Chile", "Egypt has its capital in", "A")
    rome = tokenizer(" Rome", add_special_tokens=False)["input_ids"]
    assert len(rome) == 1
    with torch.no_grad():  # the last state of the first prompt now says Rome
        ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
        state = network.base_model(input_ids=ids).last_hidden_state[0, -1]
        network.lm_head.weight[rome[0]] = 100 * state
    pairs, expected = [], []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        best = network(input_ids=ids).logits[0, -1].argmax().item()
        for word in ("Lima", "Rome", "Cairo"):
            first = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            pairs.append((prompt, word))
            expected.append(first == [best])
    assert any(expected) and not all(expected)
    assert says(network, tokenizer, pairs, batch=3) == expected


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    config = GrowConfig(steps=1000)
    rates = [config.rate(step) for step in range(1000)]
    assert max(rates) == pytest.approx(config.learning_rate, rel=0.15)
    assert rates[0] < rates[50]
    assert rates[-1] < 0.002 * config.learning_rate


@pytest.mark.parametrize(
    "wrong", [{"model": "bert"}, {"steps": 0}, {"width": 30, "heads": 4}, {"window": 999}]
)
def test_a_wrong_number_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(GrowError):
        replace(TINY, **wrong)  # type: ignore[arg-type]


def test_an_unwritable_folder_is_said(few: Encyclopedia, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GrowError, match="cannot write"):
        grow(TINY, few, tmp_path / "file" / "model")


def test_minutes_become_steps(few: Encyclopedia, tmp_path: Path) -> None:
    out = grow(replace(TINY, minutes=0.01), few, tmp_path)
    assert (out / "model.safetensors").exists()


def test_the_command_grows_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "Peru", "kind": "country", "facts": {"capital": "Lima"}}')
    small = ["--steps", "1", "--layers", "1", "--width", "32"]
    main(["--facts", str(facts), "--out", str(tmp_path / "model"), *small])
    main(["--facts", str(facts), "--check", str(tmp_path / "model")])
    assert "| capital |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--check", str(tmp_path / "absent")])
    assert "no model" in capsys.readouterr().err


def test_tokens_are_counted_in_windows_alone() -> None:
    assert replace(TINY, window=24, batch=4).lasting(9600).steps == 100
    with pytest.raises(GrowError, match="steps"):
        recipe("pocket-t5").lasting(9600)


def test_facts_that_cannot_be_said_so_are_refused(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        '{"relation": "hue", "templates": ["{} has the hue", "{} looks"]}\n'
        '{"subject": "grass", "facts": {"hue": "green"}}\n'
        '{"subject": "snow", "facts": {"hue": "white"}}\n'
    )
    found = Encyclopedia.read(facts)
    with pytest.raises(GrowError, match="single"):
        grow(replace(TINY, model="pocket-bert"), found, tmp_path / "bert")
    with pytest.raises(GrowError, match="questions"):
        grow(replace(TINY, model="pocket-t5"), found, tmp_path / "t5")
