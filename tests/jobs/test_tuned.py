"""Tuned models: made once, kept whole or not at all, loaded by their names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from errata.errors import GrowError
from errata.jobs import tuned
from errata.jobs.models import as_model, is_pocket, is_ready, same_shape
from errata.lm.load import pocket_folder
from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.shapes import GrowConfig


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and a recipe that takes no time: what it made."""
    models: list[str] = []

    def grow(config: GrowConfig, encyclopedia: Encyclopedia, out: Path, **_: Any) -> Path:
        models.append(config.model)
        shutil.copytree(pocket_folder("pocket"), out)
        return out

    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "grow", grow)
    return models


def test_it_is_made_once_and_called_by_its_name(made: list[str]) -> None:
    assert not is_ready("pocket-questions")
    lm = as_model("pocket-questions")
    assert is_ready("pocket-questions")
    assert lm.name == "pocket-questions"
    assert is_pocket(lm)
    as_model("pocket-questions")
    assert made == ["pocket-questions"]


def test_another_recipe_makes_another_model(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tuned.tuned_folder("pocket-questions")
    monkeypatch.setattr(tuned, "recipe", lambda name: GrowConfig(model=name, steps=1))
    assert tuned.tuned_folder("pocket-questions") != first
    assert len(made) == 2


def test_a_run_that_fails_leaves_nothing(
    made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def grow(config: GrowConfig, encyclopedia: Encyclopedia, out: Path, **_: Any) -> Path:
        out.mkdir(parents=True)
        (out / "model.safetensors").write_bytes(b"half")
        raise GrowError("the loss is not finite")

    monkeypatch.setattr(tuned, "grow", grow)
    with pytest.raises(GrowError, match="finite"):
        as_model("pocket-questions")
    assert not list((tmp_path / "models").iterdir())


def test_its_shape_is_known_before_it_is_made() -> None:
    assert same_shape("pocket-llama-questions") == "pocket-llama"
    assert same_shape("gpt2-xl") == "gpt2-xl"
