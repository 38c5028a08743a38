"""Which expert answers to which edit: read from the edit alone, and drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from errata.edits.memory import MemoryEdit
from errata.edits.stack import Stack
from errata.errors import ConfigError, StorageError
from errata.jobs.routes import draw_routes, routes, routes_map
from errata.lm.load import LanguageModel
from tests.edits.making import make_edit
from tests.edits.memories.making import key_edit
from tests.edits.memories.test_experts import expert
from tests.edits.memories.test_memory import TEXTS


@pytest.fixture
def experts(tiny_gpt2: LanguageModel) -> list[MemoryEdit]:
    return [expert(tiny_gpt2, text, i) for i, text in enumerate(TEXTS)]


def test_each_edit_reaches_its_own_expert(experts: list[MemoryEdit]) -> None:
    found = routes(Stack(experts))
    assert found.experts == (0, 1, 2, 3, 4) and found.threshold == 0.6
    for edit, row in enumerate(found.activations):
        assert [a > 0.6 for a in row] == [edit == expert for expert in range(5)]
    assert found.right == 5
    assert replace(found, threshold=0.99).right == 0
    assert replace(found, experts=(0, 1, 2, 4, 3)).right == 3


def test_edits_may_share_an_expert(experts: list[MemoryEdit]) -> None:
    first, second = experts[:2]
    tensors = {
        name: tensor if name != "prompts" else tensor.repeat(1, 3, 1)
        for name, tensor in first.tensors.items()
    }
    both = replace(
        first, tensors=tensors, requests=(*first.requests, *second.requests), serves=((0, 1),)
    )
    found = routes(Stack([both, experts[2]]))
    assert found.experts == (0, 0, 1)  # the third of `prompts` is no request's
    assert found.right == 3


def test_of_a_prompt_edited_twice_the_later_expert_is_drawn(
    tiny_gpt2: LanguageModel, experts: list[MemoryEdit]
) -> None:
    again = expert(tiny_gpt2, TEXTS[1], 3)  # takes the place of the second edit
    found = routes(Stack([*experts[:3], again]))
    assert len(found.activations) == len(found.activations[0]) == 3
    assert found.experts == (0, 1, 2) and found.right == 3


def test_other_memories_and_weights_are_refused(
    tiny_gpt2: LanguageModel, experts: list[MemoryEdit]
) -> None:
    for other in key_edit(tiny_gpt2, subject="Rome"), make_edit(tiny_gpt2):
        with pytest.raises(ConfigError, match="no experts"):
            routes(other)
    elsewhere = replace(experts[1], settings={"threshold": 0.7})
    with pytest.raises(ConfigError, match="several places or thresholds"):
        routes(Stack([experts[0], elsewhere]))


def test_the_picture_says_what_it_shows(experts: list[MemoryEdit], tmp_path: Path) -> None:
    figure = routes_map(routes(Stack(experts)))
    assert "5 of 5 edits reach their own expert above 0.6; 5 experts" in str(figure.get_label())
    (mesh,) = figure.axes[0].collections
    values = mesh.get_array()
    assert values is not None and values.shape == (5, 5)
    assert values.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]
    draw_routes(Stack(experts), tmp_path / "routes.svg")
    assert "5 of 5 edits" in (tmp_path / "routes.svg").read_text(encoding="utf-8")
    with pytest.raises(StorageError):
        draw_routes(Stack(experts), tmp_path / "routes.jpg")
