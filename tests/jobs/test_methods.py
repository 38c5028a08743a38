"""From names and settings to editors."""

from __future__ import annotations

import pytest

from errata.editors import EDITORS, Background
from errata.errors import ConfigError
from errata.jobs.methods import editor_for, merged, nested, recipes, settings
from errata.lm.load import LanguageModel


def test_dotted_names_are_tables() -> None:
    assert nested({"a": 1, "t.x": 2, "t.y": 3}) == {"a": 1, "t": {"x": 2, "y": 3}}
    with pytest.raises(ConfigError, match="no table"):
        nested({"t": 1, "t.x": 2})


def test_settings_win_over_recipes_field_by_field() -> None:
    assert merged({"a": 1, "t": {"x": 1, "y": 1}}, {"t": {"x": 2}}) == {
        "a": 1,
        "t": {"x": 2, "y": 1},
    }


@pytest.mark.parametrize("method", ["rome", "memit", "emmet"])
def test_recipes_follow_the_models_name(method: str, tiny_gpt2: LanguageModel) -> None:
    plain = editor_for(tiny_gpt2, method, None, Background()).config
    tiny_gpt2.name = "openai-community/gpt2-xl"
    of_paper = editor_for(tiny_gpt2, method, {"seed": 7}, Background()).config
    assert plain.layers == () and of_paper.layers and of_paper.seed == 7


def test_there_are_recipes_for_the_papers_models() -> None:
    assert {"gpt2-xl", "gpt-j-6b", "llama-2-7b"} <= set(recipes()["memit"])


@pytest.mark.parametrize("method", EDITORS)
def test_every_setting_says_what_it_is(method: str) -> None:
    for setting in settings(method):
        assert len(setting.meaning) > 10, f"{setting.name} needs a sentence under its field"


def test_unknown_methods_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="memit"):
        settings("memmit")
