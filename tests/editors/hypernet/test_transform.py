"""MEND's network against its formulas, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors.hypernet.gradients import Decomposed, decompose
from errata.editors.hypernet.transform import (
    GradientTransform,
    LRLinear,
    RunningMoments,
    TransformConfig,
    Update,
)
from errata.errors import ConfigError
from tests.editors.hypernet.models import mlps, some
from tests.lm.families import tiny_lm

SHAPES = {"a": (5, 3), "b": (3, 5), "c": (5, 3)}
ABSOLUTE = {"units": "absolute", "step": 0.01}


def rows(count: int = 9, d_in: int = 3, d_out: int = 5, *, seed: int = 0) -> Decomposed:
    generator = torch.Generator().manual_seed(seed)
    return Decomposed(
        3 + 2 * torch.randn(count, d_in, generator=generator),
        0.1 * torch.randn(count, d_out, generator=generator),
        torch.arange(count) // 3,
    )


def gradients() -> dict[str, Decomposed]:
    return {path: rows(d_in=d_in, d_out=d_out) for path, (d_out, d_in) in SHAPES.items()}


def scrambled(module: torch.nn.Module) -> None:
    """Give every parameter, zeros included, values that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_running_moments_are_those_of_all_rows_one_by_one() -> None:
    """Welford's recurrence over single rows, and the moments of all rows at once."""
    x = rows(20).inputs
    moments = RunningMoments(3)
    for part in x.split([1, 7, 0, 12]):  # type: ignore[no-untyped-call]
        moments.see(part)
    mean, squares = torch.zeros(3).double(), torch.zeros(3).double()
    for count, row in enumerate(x.double(), 1):
        moved = row - mean
        mean = mean + moved / count
        squares = squares + moved * (row - mean)
    assert_close(moments.mean, mean, rtol=1e-12, atol=0)
    assert_close(moments.squares, squares, rtol=1e-12, atol=0)
    assert_close(moments(x), (x - x.mean(0)) / (x.std(0) + 1e-7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("initial", ["xavier", "normal"])
def test_a_layer_begins_as_the_identity_and_can_learn_at_once(initial: str) -> None:
    layer = LRLinear(8, 100, modes=2, initial=initial)
    assert layer.u.shape == (8, 8) and layer.v.shape == (8, 8)
    h = torch.randn(4, 8)
    assert torch.equal(layer(h, 1), h)
    layer(h, 1).sum().backward()
    assert layer.u.grad is not None and (layer.u.grad != 0).all()
    spread = float(layer.v.detach().std())
    assert spread == pytest.approx(1.0 if initial == "normal" else (2 / 16) ** 0.5, rel=0.3)


def test_a_layer_is_its_formula() -> None:
    layer = LRLinear(8, 3, modes=2)
    scrambled(layer)
    h = torch.randn(4, 8)
    for mode in (0, 1):
        for row, found in zip(h, layer(h, mode), strict=True):
            inside = layer.scale[mode] * (layer.u @ (layer.v @ row) + layer.bias)
            wanted = row + torch.relu(inside + layer.shift[mode])
            assert_close(found, wanted)
    assert not torch.allclose(layer(h, 0), layer(h, 1))


def test_the_network_is_its_formula() -> None:
    network = GradientTransform(5, 3, 1, TransformConfig())
    scrambled(network)
    some_rows = rows()
    found = network(some_rows, 0)  # in training mode: the moments see the rows first
    x, delta = some_rows.inputs, some_rows.deltas
    h = torch.cat(
        [(x - x.mean(0)) / (x.std(0) + 1e-7), (delta - delta.mean(0)) / (delta.std(0) + 1e-7)], 1
    )
    for layer in network.layers:
        assert isinstance(layer, LRLinear)
        h = h + torch.relu(
            layer.scale[0] * (h @ layer.v.T @ layer.u.T + layer.bias) + layer.shift[0]
        )
    assert_close(found.inputs, h[:, :3])
    assert_close(found.deltas, h[:, 3:])
    assert torch.equal(found.owner, some_rows.owner)


def test_only_training_moves_the_moments() -> None:
    update = Update(SHAPES, TransformConfig())
    update(gradients())
    before = {name: tensor.clone() for name, tensor in update.state_dict().items()}
    assert before["transforms.5x3.inputs.count"] == 18  # of both weights of that shape
    update.eval()
    update(gradients())
    assert all(torch.equal(before[name], tensor) for name, tensor in update.state_dict().items())


def test_weights_of_one_shape_share_a_network_but_not_their_own_numbers() -> None:
    update = Update(SHAPES, TransformConfig(normalise=False))
    assert set(update.transforms) == {"5x3", "3x5"}
    scrambled(update)
    update.units.fill_(1.0)
    before = update(gradients())
    with torch.no_grad():
        layer = update.get_submodule("transforms.5x3.layers.0")
        assert isinstance(layer, LRLinear)
        layer.shift[1] += 1.0  # c's, not a's
        update.steps[1] *= 2.0  # b's
    after = update(gradients())
    assert torch.equal(before["a"].deltas, after["a"].deltas)
    assert not torch.allclose(before["c"].deltas, after["c"].deltas)
    assert_close(2 * before["b"].deltas, after["b"].deltas)


@pytest.mark.parametrize("initial", ["xavier", "normal"])
def test_at_first_the_change_is_one_step_along_the_raw_gradient(initial: str) -> None:
    """Without normalisation: cos = 1, and W goes down by `step` times the gradient."""
    lm = tiny_lm("gpt2")
    paths = tuple(mlps(lm, 1, 3))
    found = decompose(lm, some(lm), paths)
    config = TransformConfig.from_dict(ABSOLUTE | {"normalise": False, "initial": initial})
    with torch.no_grad():
        changes = Update.of(lm, paths, config)(found)
    for path in paths:
        raw, change = found[path].low_rank().dense(), changes[path].low_rank().dense()
        cosine = torch.nn.functional.cosine_similarity(raw.flatten(), -change.flatten(), dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-6)
        assert_close(change, -0.01 * raw)


def test_ascent_is_the_other_way() -> None:
    down, up = (
        Update(SHAPES, TransformConfig.from_dict(ABSOLUTE | {"sign": sign}), seed=3)
        for sign in ("descent", "ascent")
    )
    for update in (down, up):
        update.units.fill_(1.0)
    first, second = down(gradients()), up(gradients())
    for path in SHAPES:
        assert torch.equal(first[path].deltas, -second[path].deltas)
        assert torch.equal(first[path].inputs, second[path].inputs)


def test_relative_steps_and_rates_do_not_depend_on_size() -> None:
    """The same network on a weight ten times as large steps ten times as far."""
    lm = tiny_lm("gpt2")
    paths = tuple(mlps(lm, 1))
    plain = Update.of(lm, paths, TransformConfig())
    with torch.no_grad():
        for parameter in (lm.module(paths[0]).weight,):
            assert isinstance(parameter, Tensor)
            parameter *= 10
    larger = Update.of(lm, paths, TransformConfig())
    assert_close(larger.units / plain.units, torch.tensor([10.0, 1.0]))
    rates = Update({"a": (6, 4)}, TransformConfig(rank=2, learning_rate=0.1)).rates()
    assert rates["transforms.6x4.layers.0.u"] == pytest.approx(0.05)
    assert rates["transforms.6x4.layers.0.v"] == pytest.approx(0.01)
    assert rates["transforms.6x4.layers.1.bias"] == 0.1
    absolute = TransformConfig(
        units="absolute", step=1e-4, learning_rate=1e-6, step_learning_rate=1e-4
    )
    rates = Update({"a": (6, 4)}, absolute).rates()
    assert set(rates.values()) == {1e-6, 1.0}
    assert rates["steps"] == 1.0  # of multiples of the first step, 1e-4


def test_a_seed_gives_one_network() -> None:
    first, second, other = (Update(SHAPES, TransformConfig(), seed=seed) for seed in (1, 1, 2))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    differs = [
        not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    ]
    assert all(same) and any(differs)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rank": 0}, "rank must be positive"),
        ({"initial": "zeros"}, "initial is one of xavier, normal, not 'zeros'"),
        ({"sign": "up"}, "sign is one of descent, ascent"),
        ({"units": "cm"}, "units is one of relative, absolute"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"step": float("nan")}, "step must not be negative"),
        ({"lr": 1.0}, "has no"),
    ],
)
def test_numbers_that_make_no_network_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TransformConfig.from_dict(values)
