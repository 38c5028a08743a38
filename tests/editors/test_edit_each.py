"""Edits of many batches, each as if it were the only one, and targets that the background keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from errata.editors import EDITORS
from errata.editors.background import Background
from errata.editors.closed_form import closed_form
from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.targets import optimise_targets
from errata.edits.weights import WeightEdit
from errata.errors import ErrataError, RequestError, TargetError
from errata.lm.load import LanguageModel
from errata.requests import Request
from tests.conftest import SENTENCES

# Two are about one subject: in one batch they share a key.
REQUESTS = [
    Request("We travel to {}", "France", "Rome"),
    Request("They met at {}", "the Eiffel Tower", "Vienna"),
    Request("{}", "Marie Curie", "London"),
    Request("{} was born in", "Marie Curie", "Vienna"),
]
SMALL = {"updates": 12, "learning_rate": 0.3, "clamp": 6.0, "kl": 0.0}

CLOSED_FORM = [name for name, one in EDITORS.items() if issubclass(one.config, ClosedFormConfig)]
methods = pytest.mark.parametrize("method", CLOSED_FORM)


def background(remember: int = 0) -> Background:
    return Background(corpus=SENTENCES * 20, tokens=4000, remember=remember)


def editor(method: str, text: Background, **config: object) -> ClosedForm:
    entry = EDITORS[method]
    values = {"prefixes": [[2, 6]], "layers": [1], "target": SMALL} | config
    made = entry.editor(entry.config.from_dict(values), text)
    assert isinstance(made, ClosedForm)
    return made


def batches(size: int) -> list[list[Request]]:
    return [REQUESTS[i : i + size] for i in range(0, len(REQUESTS), size)]


def whole(edits: Sequence[WeightEdit | ErrataError]) -> list[WeightEdit]:
    found = [edit for edit in edits if isinstance(edit, WeightEdit)]
    assert len(found) == len(edits)
    return found


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many targets each optimisation looked for."""
    counts: list[int] = []

    def counted(lm: LanguageModel, groups: Sequence[Any], *args: Any, **options: Any) -> Any:
        counts.append(len(groups))
        return optimise_targets(lm, groups, *args, **options)

    monkeypatch.setattr(closed_form, "optimise_targets", counted)
    return counts


@methods
@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_edit_is_that_of_its_batch_alone(
    method: str, size: int, tiny_gpt2: LanguageModel
) -> None:
    before = {name: value.clone() for name, value in tiny_gpt2.network.state_dict().items()}
    text = background()
    found = whole(list(editor(method, text).edit_each(tiny_gpt2, batches(size))))
    for edit, batch in zip(found, batches(size), strict=True):
        alone = editor(method, text).edit(tiny_gpt2, batch)
        assert set(edit.requests) == set(alone.requests) == set(batch)
        for path, change in alone.changes.items():
            torch.testing.assert_close(
                edit.changes[path].dense(), change.dense(), rtol=2e-3, atol=2e-4
            )
    after = tiny_gpt2.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", ["memit", "emmet"])
def test_batch_sizes_and_methods_share_the_targets_that_are_remembered(
    method: str, tiny_gpt2: LanguageModel, searches: list[int]
) -> None:
    text = background(remember=4)
    whole(list(editor("memit", text).edit_each(tiny_gpt2, batches(1))))
    assert searches == [4]
    kept = whole(list(editor(method, text).edit_each(tiny_gpt2, batches(2))))
    assert searches == [4, 1]  # only the two requests that share a subject in their batch
    fresh = whole(list(editor(method, background()).edit_each(tiny_gpt2, batches(2))))
    for a, b in zip(kept, fresh, strict=True):
        for path, change in a.changes.items():
            assert torch.equal(change.dense(), b.changes[path].dense())


def test_what_targets_depend_on_is_told_apart(
    tiny_gpt2: LanguageModel, searches: list[int]
) -> None:
    text = background(remember=8)
    for config in ({}, {"layers": [2]}, {"target": SMALL | {"clamp": 2.0}}, {"seed": 1}):
        list(editor("memit", text, **config).edit_each(tiny_gpt2, batches(1)))
    assert searches == [4] * 4
    list(editor("memit", text, relaxation=0.5, spread="root").edit_each(tiny_gpt2, batches(1)))
    assert searches == [4] * 4


def test_an_edited_model_is_looked_at_anew(tiny_gpt2: LanguageModel, searches: list[int]) -> None:
    text = background(remember=4)
    memit = editor("memit", text)
    (first, *_) = whole(list(memit.edit_each(tiny_gpt2, batches(1))))
    with first.applied(tiny_gpt2):
        list(memit.edit_each(tiny_gpt2, batches(1)))
    assert searches == [4, 4]
    list(memit.edit_each(tiny_gpt2, batches(1)))
    assert searches == [4, 4]


def test_the_oldest_targets_are_forgotten(tiny_gpt2: LanguageModel, searches: list[int]) -> None:
    text = background(remember=1)
    memit = editor("memit", text)
    for some in (REQUESTS[:1], REQUESTS[1:2], REQUESTS[:1]):
        list(memit.edit_each(tiny_gpt2, [some]))
    assert searches == [1, 1, 1]


def test_a_batch_that_fails_does_not_stop_the_others(tiny_gpt2: LanguageModel) -> None:
    stuck = {"updates": 1, "learning_rate": 1e-9, "clamp": 1e-6}
    found = list(editor("memit", background(), target=stuck).edit_each(tiny_gpt2, batches(2)))
    assert [type(edit) for edit in found] == [TargetError, TargetError]
    assert "We travel to France" in str(found[0]) and "Marie Curie" in str(found[1])


def test_contradictions_are_refused_before_anything_is_computed(
    tiny_gpt2: LanguageModel, searches: list[int]
) -> None:
    other = Request("We travel to {}", "France", "Vienna")
    memit = editor("memit", background())
    with pytest.raises(RequestError, match="contradict"):
        list(memit.edit_each(tiny_gpt2, [REQUESTS[:1], [REQUESTS[0], other]]))
    assert not searches
    assert len(whole(list(memit.edit_each(tiny_gpt2, [REQUESTS[:1], [other]])))) == 2


def test_what_is_prepared_stays_as_it_was_on_the_unedited_model(tiny_gpt2: LanguageModel) -> None:
    text, other = background(), background()
    early, late = editor("memit", text), editor("memit", other)
    early.prepare(tiny_gpt2)
    (first, *_) = whole(list(editor("memit", background()).edit_each(tiny_gpt2, batches(1))))
    with first.applied(tiny_gpt2):
        contexts = early.contexts(tiny_gpt2)
        moments = text.moments(tiny_gpt2, [2])  # not prepared: block 2 is above the edited one
        assert early.edit(tiny_gpt2, REQUESTS[1:2]).record.notes["contexts"] == contexts
    assert contexts == late.contexts(tiny_gpt2)
    assert not torch.equal(moments[2].mean(2), other.moments(tiny_gpt2, [2])[2].mean(2))
