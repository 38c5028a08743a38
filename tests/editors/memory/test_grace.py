"""GRACE: what was edited is answered, what is beyond every radius is answered as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors import Background
from errata.editors.memory.grace import Grace, GraceConfig
from errata.edits.memories.codebook import Codebook
from errata.edits.memory import memory_at
from errata.edits.stack import Stack
from errata.errors import ConfigError
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits
from errata.requests import Request
from tests.conftest import TEMPLATES
from tests.edits.memories.making import query, says
from tests.lm.families import tiny_lm as any_family

FACTS = [
    Request(TEMPLATES[0], "France", "Rome"),
    Request(TEMPLATES[1], "Spain", "Vienna"),
    Request(TEMPLATES[2], "Peru", "Tokyo"),
    Request(TEMPLATES[0], "Japan", "Lima"),
]


def grace(**settings: Any) -> Grace:
    return Grace(GraceConfig.from_dict({"layers": [2], "radius": 0.05} | settings), Background())


def right(lm: LanguageModel, requests: list[Request]) -> list[bool]:
    with torch.no_grad():
        found: list[bool] = (
            answer_logits(lm, [Example(r.text, r.target) for r in requests]).right().tolist()
        )
    return found


@pytest.fixture
def trained(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("matrix", ["mlp_in", "mlp_out"])
def test_every_edit_of_a_stream_is_answered_and_nothing_beyond_the_radii(
    trained: LanguageModel, matrix: str, start: str
) -> None:
    others = [TEMPLATES[k].format(c) for k, c in ((0, "Cuba"), (1, "Italy"), (2, "Egypt"))]
    before = says(trained, others)
    editor, edits = grace(matrix=matrix, start=start), []
    for fact in FACTS:
        edit = editor.edit(trained, [fact])
        assert edit.record.notes["wrong still"] == []
        edit.apply_(trained)
        edits.append(edit)
    assert right(trained, FACTS) == [True] * 4
    said = complete(trained, [f.text for f in FACTS], new_tokens=4)
    assert all(text.strip().startswith(f.target) for text, f in zip(said, FACTS, strict=True))
    book = memory_at(trained, "codebook", edits[0].path, edits[0].settings)
    assert isinstance(book, Codebook)
    beyond = []
    for text in others:
        distance, j = book.nearest(query(trained, text, edits[0].path)[None])
        beyond.append(bool(distance > book.radii[j]))
    now = says(trained, others)
    assert all(beyond) and torch.equal(now, before)
    Stack(edits).undo_(trained)
    assert not trained.memories


def test_a_batch_is_what_each_is_alone(trained: LanguageModel) -> None:
    editor = grace()
    together = editor.edit(trained, FACTS)
    for i, fact in enumerate(FACTS):
        alone = editor.edit(trained, [fact])
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(together.tensors[name][i], tensor[0], rtol=1e-3, atol=1e-3)


def test_a_stream_does_not_train_on_what_it_wrote_before(trained: LanguageModel) -> None:
    """The keys and values of an edit are those that it has on the unedited model."""
    alone = grace().edit(trained, FACTS[1:2])
    with grace(replace="all").edit(trained, FACTS[:1]).applied(trained):
        beside = grace().edit(trained, FACTS[1:2])
    with grace().edit(trained, FACTS[:1]).applied(trained):
        after = grace().edit(trained, FACTS[1:2])
    for name, tensor in alone.tensors.items():
        assert torch.equal(after.tensors[name], tensor)
        assert beside.tensors[name].shape == tensor.shape


def test_a_prompt_within_reach_of_its_own_label_trains_that_value_on(
    trained: LanguageModel,
) -> None:
    first = grace(radius=5.0).edit(trained, FACTS[:1])
    near = Request("Now " + TEMPLATES[0], "France", "Rome")
    with first.applied(trained):
        second = grace(radius=5.0).edit(trained, [near])
        with second.applied(trained):
            book = memory_at(trained, "codebook", first.path, first.settings)
            assert isinstance(book, Codebook) and len(book.labels) == 1
            assert right(trained, [near]) == [True]
        assert right(trained, FACTS[:1]) == [True]


def test_the_later_edit_of_a_prompt_wins(trained: LanguageModel) -> None:
    other = Request(TEMPLATES[0], "France", "Lima")
    with grace().edit(trained, FACTS[:1]).applied(trained):
        with grace().edit(trained, [other]).applied(trained):
            assert right(trained, [other]) == [True]
        assert right(trained, FACTS[:1]) == [True]


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
@pytest.mark.parametrize("layer", [None, -1], ids=["usual", "last"])
def test_encoders_and_encoder_decoders_are_edited(family: str, layer: int | None) -> None:
    lm = any_family(family)
    settings = {} if layer is None else {"layers": [lm.layers - 1]}
    fact = Request("We travel to {}", "France", "Rome")
    editor = Grace(GraceConfig.from_dict({"radius": 0.05} | settings), Background())
    assert layer is not None or editor.layers(lm)[0] in lm.reading
    edit = editor.edit(lm, [fact])
    before = right(lm, [fact])
    with edit.applied(lm):
        now = answer_logits(lm, [Example(fact.text, fact.target)]).losses()
    plain = answer_logits(lm, [Example(fact.text, fact.target)]).losses()
    assert float(now.detach()) < float(plain.detach()) and before == [False]


def test_one_layer_alone(trained: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="beside one layer"):
        grace(layers=[1, 2]).edit(trained, FACTS[:1])
    with pytest.raises(ConfigError, match="replace is one of last, prompt"):
        grace(replace="some")
