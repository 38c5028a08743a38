"""How large models are, with and without their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata.lm.load import LanguageModel
from errata.lm.shape import Shape, is_here, shape_named


def test_a_config_tells_the_shape(tiny_folder: Path) -> None:
    lm = LanguageModel.load(tiny_folder)
    shape = shape_named(str(tiny_folder))
    assert shape == Shape(4, 32, 128, 384, sum(w.numel() for w in lm.network.parameters()))


@pytest.mark.parametrize(
    ("numbers", "billions"),
    [((48, 1600, 6400, 50257), 1.56), ((28, 4096, 16384, 50400), 5.84)],
    ids=["GPT-2 XL", "GPT-J"],
)
def test_four_numbers_come_near(numbers: tuple[int, int, int, int], billions: float) -> None:
    shape = Shape.of(*numbers)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.flops == 2 * (shape.parameters - numbers[1] * numbers[3])


def test_what_is_here(tiny_folder: Path) -> None:
    assert is_here("pocket") and is_here(str(tiny_folder))
    assert not is_here("nobody/has-such-a-model") and not is_here("no such name at all!")
    assert shape_named("nobody/has-such-a-model") is None
