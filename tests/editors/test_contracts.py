"""What every editor promises, whatever its method: all of EDITORS against all behaviours.

Methods that must learn first promise the same; they are held to it where they are fitted.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.editors import EDITORS, Background, Editor
from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.memory.grace import Grace
from errata.editors.memory.scen import Scen
from errata.editors.memory.t_patcher import TPatcher
from errata.editors.trainable import Trainable
from errata.editors.tuning.finetune import FineTune
from errata.editors.tuning.neurons import KnowledgeNeurons
from errata.edits.edit import Edit, as_json
from errata.edits.file import load_edit
from errata.edits.memory import MemoryEdit
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, NotFiniteError, RequestError
from errata.lm.forward import logits_at
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode_requests, pad
from errata.requests import Request
from tests.conftest import SENTENCES

# A random network moves nothing from one token to the next, so these end with their subject:
# what is written there is what is said.
REQUESTS = [
    Request("We travel to {}", "France", "Rome"),
    Request("She was a friend of {}", "Marie Curie", "London"),
    Request("They met at {}", "the Eiffel Tower", "Vienna"),
]
FORTY = " ".join(["Danube and Rhine flow to the sea"] * 6)

SMALL: dict[type[Editor], dict[str, Any]] = {
    ClosedForm: {
        "layers": [1],
        "prefixes": [[2, 6]],
        "target": {"updates": 12, "learning_rate": 0.3, "clamp": 6.0, "kl": 0.0},
    },
    FineTune: {"layers": [1], "updates": 8, "learning_rate": 0.2, "norm_limit": 1.0},
    Grace: {"layers": [1], "updates": 20},
    TPatcher: {
        "memory_tokens": 500,
        "patch": {"updates": 100, "check_from": 50, "learning_rate": 0.3, "memory": 1.0},
    },
    Scen: {"layers": [1], "learning_rate": 0.2, "neuron_learning_rate": 0.3},
    KnowledgeNeurons: {"steps": 3, "prefixes": [], "embedding": "output"},
}
"""Numbers with which an edit of a tiny random model takes in a moment, by kind of editor."""

methods = pytest.mark.parametrize(
    "method", [name for name in EDITORS if not issubclass(EDITORS[name].editor, Trainable)]
)


def editor(method: str, **config: object) -> Editor:
    entry = EDITORS[method]
    (small,) = (small for kind, small in SMALL.items() if issubclass(entry.editor, kind))
    return entry.editor(
        entry.config.from_dict(small | config), Background(corpus=SENTENCES * 20, tokens=4000)
    )


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def probability(lm: LanguageModel, request: Request) -> float:
    """Log-probability of the target's first token after the bare prompt."""
    (row,) = encode_requests(lm, [request])
    place = torch.tensor([row.prompt_length - 1])
    logits = logits_at(
        lm, pad(lm, [row.ids]), torch.zeros_like(place), place, [row.prompt_length - 1]
    )
    return float(logits.double().log_softmax(dim=1)[0, row.answer[0]])


def took(method: str, earlier: float, later: float, by: float = 0.0) -> bool:
    """Whether a target became likelier; in a random model, neurons that are moved promise less."""
    if issubclass(EDITORS[method].editor, KnowledgeNeurons):
        return later != earlier
    return later > earlier + by


def dense(edit: Edit) -> dict[str, Tensor]:
    """What an edit holds: the change of each weight, or the tensors of a memory's entries."""
    if isinstance(edit, MemoryEdit):
        return dict(edit.tensors)
    assert isinstance(edit, WeightEdit)
    return {path: change.dense() for path, change in edit.changes.items()}


@methods
def test_an_edit_changes_what_the_model_says_and_nothing_is_left_behind(
    method: str, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    before = weights(tiny_lm)
    edit = editor(method).edit(tiny_lm, REQUESTS)
    assert same(before, weights(tiny_lm))
    assert all(parameter.requires_grad for parameter in tiny_lm.network.parameters())
    assert edit.requests == tuple(REQUESTS)
    said = [probability(tiny_lm, request) for request in REQUESTS]
    edit.save(tmp_path / "edit.safetensors")
    with load_edit(tmp_path / "edit.safetensors").applied(tiny_lm):
        now = [probability(tiny_lm, request) for request in REQUESTS]
    assert all(took(method, a, b, by=0.5) for a, b in zip(said, now, strict=True))
    assert same(before, weights(tiny_lm))


@methods
def test_the_same_seed_gives_the_same_edit(method: str, tiny_gpt2: LanguageModel) -> None:
    first, second = (dense(editor(method).edit(tiny_gpt2, REQUESTS[:2])) for _ in range(2))
    assert first.keys() == second.keys() and same(first, second)


@methods
def test_the_global_random_state_is_left_alone(method: str, tiny_gpt2: LanguageModel) -> None:
    state = torch.random.get_rng_state()
    editor(method).edit(tiny_gpt2, REQUESTS[:1])
    assert torch.equal(state, torch.random.get_rng_state())


@methods
@pytest.mark.parametrize(
    "request_",
    [
        Request("Look at {}", "Zoë 🦊👩‍🚀", "Paris"),
        Request("The set {a, b} of {}", "Wien {old}", " Rome"),
        Request("Rome, not Rome: {}", "Rome", "Paris"),
        Request("About {}", "Vienna", FORTY),
        Request("日本の首都は{}", "東京", "Ü"),
    ],
    ids=["emoji", "braces", "twice", "forty tokens", "ideographs"],
)
def test_unusual_requests_are_carried_out(
    method: str, tiny_gpt2: LanguageModel, request_: Request
) -> None:
    edit = editor(method).edit(tiny_gpt2, [request_])
    earlier = probability(tiny_gpt2, request_)
    with edit.applied(tiny_gpt2):
        assert took(method, earlier, probability(tiny_gpt2, request_))


@methods
def test_contradictions_are_refused_by_name(method: str, tiny_gpt2: LanguageModel) -> None:
    other = Request("We travel to {}", "France", "Vienna")
    with pytest.raises(RequestError, match=r"We travel to France.*'Rome'.*'Vienna'"):
        editor(method).edit(tiny_gpt2, [*REQUESTS, other])


@methods
def test_no_request_is_refused(method: str, tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(RequestError, match="no request"):
        editor(method).edit(tiny_gpt2, [])


@methods
def test_a_layer_beyond_the_model_is_refused(method: str, tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="blocks 0 to 3, not 9"):
        editor(method, layers=[9]).edit(tiny_gpt2, REQUESTS)


@methods
def test_damaged_weights_are_refused_and_left_as_they_are(
    method: str, tiny_gpt2: LanguageModel
) -> None:
    damaged = copy.deepcopy(tiny_gpt2)
    with torch.no_grad():
        next(damaged.mlp_in(0).parameters())[0, 0] = float("nan")
    before = weights(damaged)
    with pytest.raises(NotFiniteError, match="NaN"):
        editor(method).edit(damaged, REQUESTS)
    after = weights(damaged)
    assert all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)


@methods
def test_a_config_refuses_what_it_does_not_know(method: str) -> None:
    with pytest.raises(ConfigError, match="lamda"):
        EDITORS[method].config.from_dict({"lamda": 3})
    with pytest.raises(ConfigError, match="ascending"):
        EDITORS[method].config.from_dict({"layers": [2, 1]})


@methods
def test_a_config_survives_its_record(method: str) -> None:
    config = editor(method, layers=[1, 2], seed=5).config
    read = json.loads(json.dumps(as_json(config.to_dict())))
    assert EDITORS[method].config.from_dict(read) == config


@methods
def test_a_record_tells_how_to_make_the_edit_again(method: str, tiny_gpt2: LanguageModel) -> None:
    made = editor(method, seed=3).edit(tiny_gpt2, REQUESTS[:1])
    assert (made.record.method, made.record.seed, made.record.model) == (method, 3, "tiny-gpt2")
    assert made.record.notes["left out"] == []
    again = EDITORS[method].config.from_dict(made.record.config)
    background = Background(corpus=SENTENCES * 20, tokens=4000)
    remade = EDITORS[method].editor(again, background).edit(tiny_gpt2, REQUESTS[:1])
    assert same(dense(made), dense(remade))


@methods
def test_each_batch_gets_the_edit_that_it_has_alone(method: str, tiny_gpt2: LanguageModel) -> None:
    before = weights(tiny_gpt2)
    batches = [REQUESTS[:2], REQUESTS[2:]]
    each = list(editor(method).edit_each(tiny_gpt2, batches))
    for batch, edit in zip(batches, each, strict=True):
        assert isinstance(edit, Edit)
        alone = dense(editor(method).edit(tiny_gpt2, batch))
        assert edit.requests == tuple(batch)
        for path, change in dense(edit).items():
            torch.testing.assert_close(change, alone[path], rtol=1e-3, atol=1e-5)
    assert same(before, weights(tiny_gpt2))
    with pytest.raises(RequestError, match="no request"):
        list(editor(method).edit_each(tiny_gpt2, [REQUESTS[:1], []]))
    with pytest.raises(ConfigError, match="not 9"):
        list(editor(method, layers=[9]).edit_each(tiny_gpt2, batches))


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_edited_in_their_own_dtype(
    method: str, tiny_gpt2: LanguageModel, dtype: torch.dtype
) -> None:
    tiny_gpt2.network.to(dtype=dtype)  # type: ignore[call-arg]
    before = weights(tiny_gpt2)
    edit = editor(method).edit(tiny_gpt2, REQUESTS[:1])
    assert same(before, weights(tiny_gpt2))
    earlier = probability(tiny_gpt2, REQUESTS[0])
    with edit.applied(tiny_gpt2):
        assert took(method, earlier, probability(tiny_gpt2, REQUESTS[0]), by=1.0)
