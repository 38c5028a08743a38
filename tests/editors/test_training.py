"""The outer loop: what is read when, when it stops, and that a killed run goes on as if it had not.

The killed run is a real one, of MEND, in `test_mend.py`; here a learner of one number is trained.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from errata.editors.trainable import TrainingCases
from errata.editors.training import (
    CHECKPOINT,
    Learner,
    TrainingConfig,
    batch_at,
    train,
)
from errata.errors import ConfigError, EditFileError, FitError, NotFiniteError
from errata.requests import Case, Request

CASES = tuple(Case(Request("{} is", str(i), "so"), case_id=str(i)) for i in range(10))
DIVIDED = TrainingCases(CASES[:8], CASES[8:])
CONFIG = TrainingConfig(steps=40, batch=3, at_once=2, validate_every=5, validation=2, patience=100)


class Toy(Learner):
    """Learns the mean of some noisy numbers; its buffer counts what it has seen in training."""

    seen: Tensor

    def __init__(self, rate: float = 0.05, bad_at: int | None = None) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([3.0, -2.0]))
        self.register_buffer("seen", torch.zeros(()))
        self.rate, self.bad_at = rate, bad_at
        self.told: list[Mapping[str, float]] = []

    def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        if self.training:
            self.seen += len(cases)
        wanted = torch.tensor([float(case.case_id) + draw.gauss(0, 0.1) for case in cases])
        far = ((self.x.sum() - wanted) ** 2).mean()
        bad = self.training and self.bad_at is not None and self.seen > self.bad_at
        return {"loss": far * float("nan") if bad else far, "far": far.detach().sqrt()}

    def rates(self) -> Mapping[str, float]:
        return {"x": self.rate}

    def validated(self, means: Mapping[str, float]) -> None:
        self.told.append(means)


def test_each_epoch_has_each_case_once_in_an_order_of_its_own() -> None:
    steps = [batch_at(CASES, step, 4, seed=0) for step in range(10)]
    read = [case for batch in steps for case in batch]
    epochs = [read[i : i + 10] for i in range(0, 40, 10)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(CASES)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert batch_at(CASES, 3, 4, seed=0) == steps[3]
    assert [batch_at(CASES, step, 4, seed=1) for step in range(10)] != steps


def test_it_learns_and_tells(tmp_path: Path) -> None:
    learner, bars = Toy(), []
    trained = train(
        learner, DIVIDED, CONFIG, folder=tmp_path, progress=lambda *told: bars.append(told)
    )
    losses = [found["loss"] for found in trained.validations]
    assert [found["step"] for found in trained.validations] == list(range(5, 45, 5))
    assert losses[-1] < 0.6 * losses[0]
    assert trained.steps == 40 and trained.stopped.startswith("all 40 steps are made")
    assert bars[0] == ("steps", 0, 40) and bars[-1] == ("steps", 40, 40)
    assert int(learner.seen) == 3 * trained.best and not learner.training
    assert [means["loss"] for means in learner.told] == losses


def test_it_stops_when_validation_gets_no_better_and_keeps_the_best(tmp_path: Path) -> None:
    """The validation cases lie beyond those that are learnt from, so it overshoots them."""
    cases = TrainingCases(tuple(CASES[8:]), tuple(CASES[2:4]))
    config = TrainingConfig(steps=500, batch=2, validate_every=5, patience=20)
    learner = Toy(rate=0.1)
    trained = train(learner, cases, config)
    best = min(trained.validations, key=lambda found: found["loss"])
    assert trained.best == best["step"] < trained.steps == trained.best + 20
    assert f"best at step {trained.best}" in trained.stopped and "early" in trained.stopped
    with torch.no_grad():
        again = float(learner.loss(cases.validation, random.Random("validation 0"))["loss"])
    assert again == pytest.approx(best["loss"])


def stopped_at(step: int, folder: Path, config: TrainingConfig = CONFIG) -> None:
    """A run that is interrupted at a step."""

    def progress(stage: str, done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Toy(), DIVIDED, config, folder=folder, progress=progress)


@pytest.mark.parametrize("step", [3, 5, 23])
def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(step: int, tmp_path: Path) -> None:
    whole = Toy()
    wanted = train(whole, DIVIDED, CONFIG, folder=tmp_path / "whole")
    stopped_at(step, tmp_path / "cut")
    learner, began = Toy(), []
    found = train(
        learner, DIVIDED, CONFIG, folder=tmp_path / "cut", progress=lambda *told: began.append(told)
    )
    assert began[0][1] == step // 5 * 5
    assert found == wanted
    assert torch.equal(learner.x, whole.x) and torch.equal(learner.seen, whole.seen)
    files = [tmp_path / name / CHECKPOINT for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    longer = TrainingConfig.from_dict(CONFIG.to_dict() | {"steps": 60})
    whole, learner = Toy(), Toy()
    wanted = train(whole, DIVIDED, longer)
    train(Toy(), DIVIDED, CONFIG, folder=tmp_path)
    assert train(learner, DIVIDED, longer, folder=tmp_path) == wanted
    assert torch.equal(learner.x, whole.x)


@pytest.mark.parametrize("other", ["cases", "numbers", "seed", "identity"])
def test_another_runs_checkpoint_is_refused(other: str, tmp_path: Path) -> None:
    stopped_at(12, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    cases = TrainingCases(CASES[1:8], CASES[8:]) if other == "cases" else DIVIDED
    config = TrainingConfig.from_dict(
        CONFIG.to_dict() | ({"batch": 4} if other == "numbers" else {})
    )
    with pytest.raises(FitError, match="checkpoint of another fit"):
        train(
            Toy(),
            cases,
            config,
            seed=int(other == "seed"),
            folder=tmp_path,
            identity={"model": "b"} if other == "identity" else None,
        )
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    stopped_at(12, tmp_path)
    file = tmp_path / CHECKPOINT
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(EditFileError, match="altered"):
        train(Toy(), DIVIDED, CONFIG, folder=tmp_path)


def test_nan_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(FitError) as caught:  # 3 cases a step, so in the 14th
        train(Toy(bad_at=40), DIVIDED, CONFIG, folder=tmp_path)
    message = str(caught.value)
    assert "step 13: the loss became nan on '" in message
    assert "last good checkpoint, of step 10" in message and str(tmp_path) in message
    learner, began = Toy(), []
    train(learner, DIVIDED, CONFIG, folder=tmp_path, progress=lambda *told: began.append(told))
    assert began[0][1] == 10 and learner.x.isfinite().all()
    with pytest.raises(FitError, match="no checkpoint was kept"):
        train(Toy(bad_at=0), DIVIDED, CONFIG)


def test_an_edited_model_that_overflows_stops_the_run_too(tmp_path: Path) -> None:
    class Overflows(Toy):
        def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
            if int(self.seen) > 40:
                raise NotFiniteError("the model overflows")
            return super().loss(cases, draw)

    with pytest.raises(FitError, match=r"step 13: the model overflows on '.*of step 10, is "):
        train(Overflows(), DIVIDED, CONFIG, folder=tmp_path)


def test_an_infinite_gradient_stops_the_run() -> None:
    class Steep(Toy):
        def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
            return {"loss": (self.x * 0).sqrt().sum()}  # 0, with an infinite slope

    with pytest.raises(FitError, match="gradient's norm became"):
        train(Steep(), DIVIDED, CONFIG)


def test_the_gradient_is_clipped() -> None:
    """Adam does not see a constant factor, so the clip is seen in its second moments alone."""
    tight = TrainingConfig.from_dict(CONFIG.to_dict() | {"clip": 1e-12, "steps": 5})
    learner = Toy()
    before = learner.x.detach().clone()
    train(learner, DIVIDED, tight)
    assert (learner.x - before).abs().max() < 0.01 * Toy().rate * 5


def test_batches_in_several_passes_have_the_same_gradient() -> None:
    """Of eight cases, three passes of three, three and two, each weighed by its cases."""

    class Exact(Toy):
        def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
            wanted = torch.tensor([float(case.case_id) for case in cases])
            return {"loss": ((self.x.sum() - wanted) ** 2).mean()}

    found = []
    for at_once in (3, 8):
        learner = Exact()
        numbers = {"batch": 8, "steps": 5, "at_once": at_once}
        train(learner, DIVIDED, TrainingConfig.from_dict(CONFIG.to_dict() | numbers))
        found.append(learner.x.detach())
    assert_close(found[0], found[1])
    assert not torch.equal(found[0], Toy().x)


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(FitError, match="cases to validate with"):
        train(Toy(), TrainingCases(CASES, ()), CONFIG)
    with pytest.raises(FitError, match="at least two"):
        TrainingCases.split(CASES[:1])


def test_the_split_is_drawn_by_the_seed() -> None:
    divided = TrainingCases.split(CASES, seed=0)
    assert len(divided.validation) == 1 and len(divided.train) == 9
    assert set(divided.train) | set(divided.validation) == set(CASES)
    assert TrainingCases.split(CASES, seed=0) == divided
    assert len({TrainingCases.split(CASES, seed=s).validation for s in range(20)}) > 3
    assert len(TrainingCases.split(CASES[:2]).validation) == 1


def test_cases_about_one_fact_are_not_divided() -> None:
    twice = [replace(case, relation="capital", case_id=n) for case in CASES for n in ("1", "2")]
    divided = TrainingCases.split(twice, share=0.3)
    facts = [{case.fact for case in part} for part in (divided.train, divided.validation)]
    assert facts[0].isdisjoint(facts[1]) and len(divided.validation) == 6
    one = TrainingCases.split(twice[:2])
    assert len(one.train) == len(one.validation) == 1


@pytest.mark.parametrize("name", ["steps", "batch", "at_once", "validate_every", "clip"])
def test_numbers_that_do_nothing_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be positive"):
        TrainingConfig.from_dict({name: 0})
