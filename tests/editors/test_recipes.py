"""Recipes: every file is read, understood by its config, and found by the names it is for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from errata.editors import EDITORS
from errata.editors import recipes as reader
from errata.editors.recipes import recipe, recipes
from errata.errors import ConfigError

METHODS = ("rome", "memit", "emmet")
NAMES = {
    "gpt2-medium": ["gpt2-medium", "openai-community/gpt2-medium"],
    "gpt2-large": ["gpt2-large", "openai-community/gpt2-large"],
    "gpt2-xl": ["gpt2-xl", "openai-community/gpt2-xl", "GPT2-XL", "/models/gpt2-xl/"],
    "gpt-j-6b": ["EleutherAI/gpt-j-6b", "EleutherAI/gpt-j-6B"],
    "llama-2-7b": ["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"],
    "llama-2-13b": ["meta-llama/Llama-2-13b-hf"],
    "llama-3-8b": [
        "meta-llama/Meta-Llama-3-8B",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "meta-llama/Llama-3-8B",
    ],
    "mistral-7b": [
        "mistralai/Mistral-7B-v0.1",
        "mistralai/Mistral-7B-v0.3",
        "mistralai/Mistral-7B-Instruct-v0.2",
    ],
    "qwen2.5-7b": ["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"],
}
BLOCKS = {
    "gpt2-medium": 24,
    "gpt2-large": 36,
    "gpt2-xl": 48,
    "gpt-j-6b": 28,
    "llama-2-7b": 32,
    "llama-2-13b": 40,
    "llama-3-8b": 32,
    "mistral-7b": 32,
    "qwen2.5-7b": 28,
}


def folder() -> Path:
    return Path(str(resources.files("errata"))) / "recipes"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_found_by_its_names(method: str, name: str) -> None:
    values = [recipe(method, model) for model in NAMES[name]]
    assert values[0] is not None
    assert all(value == values[0] for value in values)
    layers = values[0]["layers"]
    assert layers == list(range(layers[0], layers[-1] + 1))
    assert 0 < layers[-1] < BLOCKS[name] / 2


@pytest.mark.parametrize("method", METHODS)
def test_other_models_have_none(method: str) -> None:
    others = ["gpt2", "distilgpt2-xl-tiny", "meta-llama/Llama-2-70b-hf", "meta-llama/Llama-3.1-8B"]
    for name in [*others, "Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-0.5B", "mistralai/Mixtral-8x7B-v0.1"]:
        assert recipe(method, name) is None


@pytest.mark.parametrize(
    "path", sorted(folder().rglob("*.toml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_file_fits_its_config(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "a recipe says where its numbers are from"
    assert path.stem in recipes(path.parent.name)
    values = next(v for file, _, v in reader._all(path.parent.name) if file == path.name)
    config = EDITORS[path.parent.name].config.from_dict(values)
    assert config.to_dict()["layers"] == tuple(values.get("layers", ()))
    for name, value in values.get("target", {}).items():
        assert config.to_dict()["target"][name] == value


def test_the_papers_own_numbers() -> None:
    xl = recipe("memit", "gpt2-xl")
    assert xl is not None
    assert xl["layers"] == [13, 14, 15, 16, 17] and xl["relaxation"] == 20_000
    assert xl["target"] == {
        "units": "absolute",
        "updates": 19,  # 20 steps of the reference code
        "learning_rate": 0.5,
        "decay": 0.5,
        "clamp": 0.75,
        "kl": 0.0625,
        "stop_below": 0.05,
    }


def test_recipes_of_a_method() -> None:
    assert set(NAMES) <= set(recipes("rome"))
    assert recipes("unheard-of") == [] and recipe("unheard-of", "gpt2-xl") is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.toml": "models = ["}, "a.toml is not TOML"),
        ({"a.toml": "layers = [1]"}, "a.toml needs a list `models`"),
        ({"a.toml": 'models = ["x"]', "b.toml": 'models = ["X*"]'}, "a.toml, b.toml .* narrower"),
    ],
)
def test_broken_recipes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], message: str
) -> None:
    (tmp_path / "recipes" / "rome").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "recipes" / "rome" / name).write_text(text)
    fake: Any = SimpleNamespace(files=lambda _package: tmp_path)
    monkeypatch.setattr(reader, "resources", fake)
    with pytest.raises(ConfigError, match=message):
        recipe("rome", "x")
