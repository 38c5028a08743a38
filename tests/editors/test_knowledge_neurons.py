"""Knowledge-neuron edits of facts that we planted: one neuron each, known by number."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from errata.editors import EDITORS, Background
from errata.editors.tuning.neurons import KnowledgeNeurons
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, TargetError
from errata.jobs.methods import editor_for
from errata.lm.load import LanguageModel
from errata.lm.loss import predictions
from errata.lm.weights import weight_out_in
from errata.requests import Request
from tests.lm.families import tiny_lm
from tests.locate.planted import FACTS, STRANGER, WORDS, WRITTEN, neuron, planted

ASK = "the birthplace of {}"
"""Ends with the subject, where the planted neurons fire."""
KNOWN = "Ada Bell"
FACT = Request(ASK, KNOWN, "Lima", "Rome")
LAYER = 2


def editor(**values: Any) -> KnowledgeNeurons:
    small = {"prefixes": [], "steps": 5, "embedding": "output"}
    config = EDITORS["kn"].config.from_dict(small | values)
    made = EDITORS["kn"].editor(config, Background())
    assert isinstance(made, KnowledgeNeurons)
    return made


def answers(lm: LanguageModel) -> dict[str, str]:
    asked = [ASK.replace("{}", subject) for subject in FACTS]
    return dict(zip(FACTS, predictions(lm, asked, new_tokens=1), strict=True))


def only(edit: WeightEdit) -> Tensor:
    (change,) = edit.changes.values()
    return change.dense()


def gain(*, old: str, new: str, remove: float, add: float) -> Tensor:
    """What a planted value vector gains; each answer's output embedding is a unit vector."""
    head = planted().head.weight
    assert isinstance(head, Tensor)

    def embedded(text: str) -> Tensor:
        return head[[WORDS.index(word) for word in text.split()]].mean(dim=0).detach()

    return add * normalize(embedded(new), dim=0) - remove * normalize(embedded(old), dim=0)


def test_a_fact_is_rewritten_in_its_own_neuron_and_nowhere_else() -> None:
    lm = planted(LAYER)
    assert answers(lm) == FACTS
    edit = editor().edit(lm, [FACT])
    (path,) = edit.paths
    assert path == lm.mlp_out_path(LAYER) and edit.changes[path].rank == 1
    ((found,),) = edit.record.notes["neurons"].values()
    assert (found["layer"], found["index"]) == (LAYER, neuron(KNOWN))
    change = only(edit)
    wanted = gain(old="Rome", new="Lima", remove=1.0, add=8.0) * WRITTEN
    assert_close(change[:, neuron(KNOWN)], wanted)
    assert not change[:, [i for i in range(change.shape[1]) if i != neuron(KNOWN)]].any()
    with edit.applied(lm):
        assert answers(lm) == FACTS | {KNOWN: "Lima"}
    assert answers(lm) == FACTS


def test_an_erased_fact_is_forgotten() -> None:
    lm = planted(LAYER)
    edit = editor(mode="erase").edit(lm, [FACT])
    with edit.applied(lm):
        assert not weight_out_in(lm.mlp_out(LAYER))[:, neuron(KNOWN)].any()
        after = answers(lm)
    assert after[KNOWN] not in FACTS.values()
    assert after | {KNOWN: FACTS[KNOWN]} == FACTS


def test_fixed_amounts_ignore_how_long_the_value_vector_is() -> None:
    lm = planted(LAYER)
    change = only(editor(mode="fixed", add=2.0, remove=2.0).edit(lm, [FACT]))
    wanted = gain(old="Rome", new="Lima", remove=2.0, add=2.0)
    assert_close(change[:, neuron(KNOWN)], wanted)


def test_an_answer_of_several_words_is_the_mean_of_their_embeddings() -> None:
    lm = planted(LAYER)
    change = only(editor().edit(lm, [Request(ASK, KNOWN, "Lima Cairo", "Rome")]))
    wanted = gain(old="Rome", new="Lima Cairo", remove=1.0, add=8.0) * WRITTEN
    assert_close(change[:, neuron(KNOWN)], wanted)


def test_requests_that_share_a_neuron_add_up_from_where_it_was() -> None:
    lm = planted(LAYER)
    again = Request("of {}", KNOWN, "Cairo", "Rome")
    together = only(editor().edit(lm, [FACT, again]))
    apart = [only(editor().edit(lm, [request])) for request in (FACT, again)]
    assert_close(together, apart[0] + apart[1])
    erased = [only(editor(mode="erase").edit(lm, some)) for some in ([FACT], [FACT, again])]
    assert torch.equal(*erased)


def test_what_is_said_today_is_asked_of_the_model_if_nobody_tells() -> None:
    lm = planted(LAYER)
    untold = editor().edit(lm, [Request(ASK, KNOWN, "Lima")])
    assert torch.equal(only(untold), only(editor().edit(lm, [FACT])))
    with pytest.raises(TargetError, match="says nothing readable; give `true`"):
        editor().edit(lm, [Request(ASK, STRANGER, "Lima")])


def test_the_prompt_is_asked_after_contexts_too() -> None:
    lm = planted(LAYER)
    edit = editor(contexts=["is", "the of"]).edit(lm, [FACT])
    assert edit.record.notes["contexts"] == ["", "is", "the of"]
    assert_close(only(edit), only(editor().edit(lm, [FACT])))


def test_a_fact_without_neurons_fails_by_name_or_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = planted(LAYER)
    unknown = Request(ASK, STRANGER, "Lima", "Cairo")
    with pytest.raises(TargetError, match="1 of 2 requests .*\n.*Liam Moor.* speaks for 'Cairo'"):
        editor().edit(lm, [FACT, unknown])
    with pytest.raises(TargetError, match="1 of 1"):
        editor(keep_going=True).edit(lm, [unknown])
    with pytest.raises(TargetError, match="1 of 1"):
        editor(layers=[1, 3]).edit(lm, [FACT])
    with caplog.at_level(logging.WARNING):
        edit = editor(keep_going=True).edit(lm, [FACT, unknown])
    assert edit.requests == (FACT,) and "left out" in caplog.text
    assert ["Liam Moor" in told for told in edit.record.notes["left out"]] == [True]
    assert torch.equal(only(edit), only(editor().edit(lm, [FACT])))
    first, second = editor().edit_each(lm, [[unknown], [FACT]])
    assert isinstance(first, TargetError) and isinstance(second, WeightEdit)


@pytest.mark.parametrize("variant", ["bert", "roberta", "distilbert"])
def test_masked_encoders_are_edited_too(variant: str) -> None:
    lm = tiny_lm(variant)
    mask = lm.tokenizer.mask_token
    request = Request(f"{mask} is the capital of {{}}", "France", "Rome", "Paris")
    before = weight_out_in(lm.mlp_out(1)).clone()
    edit = editor(embedding="input", prefixes=[[2, 6]]).edit(lm, [request])
    assert edit.record.notes["contexts"] == [""]  # an encoder writes no prefixes
    assert all(change.norm() > 0 for change in edit.changes.values())
    assert torch.equal(before, weight_out_in(lm.mlp_out(1)))


def test_other_models_are_refused() -> None:
    labelled = Request("{}", "The Nile flows to the sea.", "supports")
    with pytest.raises(ConfigError, match="tiny-bert-labels is neither"):
        editor(mode="erase").edit(tiny_lm("bert-labels"), [labelled])
    with pytest.raises(ConfigError, match="^kn edits decoders and encoders; tiny-t5 is an enc"):
        editor_for(tiny_lm("t5"), "kn", {}, Background())
    narrow = Request("The capital of {} is", "France", "Rome", "Paris")
    for embedding in ("input", "output"):
        with pytest.raises(ConfigError, match="16 wide and its value vectors 24"):
            editor(embedding=embedding).edit(tiny_lm("opt-350m"), [narrow])
    assert editor(mode="erase").edit(tiny_lm("opt-350m"), [narrow]).changes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "delete"}, "mode is one of rewrite, fixed, erase"),
        ({"embedding": "both"}, "embedding is one of input, output"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"steps": 0}, "at least one step"),
        ({"layers": [LAYER, 9]}, "blocks 0 to 4, not 9"),
    ],
)
def test_numbers_without_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        editor(**values).edit(planted(LAYER), [FACT])
