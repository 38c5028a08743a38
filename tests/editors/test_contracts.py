"""What every editor promises, whatever its method: all of EDITORS against all behaviours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errata.editors import EDITORS
from errata.editors.background import Background
from errata.editors.closed_form.closed_form import ClosedForm
from errata.edits.file import load_edit
from errata.errors import ConfigError, NotFiniteError, RequestError, TargetError
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

SMALL = {"updates": 12, "learning_rate": 0.3, "clamp": 6.0, "kl": 0.0}

methods = pytest.mark.parametrize("method", EDITORS)


def editor(method: str, **config: object) -> ClosedForm:
    entry = EDITORS[method]
    small = {
        "prefixes": [[2, 6]],
        "layers": [1],
        "target": SMALL,
    }
    return entry.editor(
        entry.config.from_dict(small | config), Background(corpus=SENTENCES * 20, tokens=4000)
    )


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def probability(lm: LanguageModel, request: Request) -> float:
    """Log-probability of the target's first token after the bare prompt."""
    (row,) = encode_requests(lm, [request])
    place = torch.tensor([row.prompt_length - 1])
    with torch.no_grad():
        logits = logits_at(lm, pad(lm, [row.ids]), torch.zeros_like(place), place)
    return float(logits.double().log_softmax(dim=1)[0, row.answer[0]])


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
    assert all(after > earlier + 0.5 for earlier, after in zip(said, now, strict=True))
    assert same(before, weights(tiny_lm))


@methods
def test_the_same_seed_gives_the_same_edit(method: str, tiny_gpt2: LanguageModel) -> None:
    first, second = (editor(method).edit(tiny_gpt2, REQUESTS[:2]) for _ in range(2))
    for path, change in first.changes.items():
        assert torch.equal(change.dense(), second.changes[path].dense())


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
        assert probability(tiny_gpt2, request_) > earlier


@methods
def test_several_requests_about_one_subject_share_its_key(
    method: str, tiny_gpt2: LanguageModel
) -> None:
    requests = [
        Request("{}", "Marie Curie", "discovered"),
        Request("{} was born in", "Marie Curie", "London"),
        Request("People say that {}", "Marie Curie", "likely"),
    ]
    earlier = [probability(tiny_gpt2, request) for request in requests]
    with editor(method).edit(tiny_gpt2, requests).applied(tiny_gpt2):
        later = [probability(tiny_gpt2, request) for request in requests]
    assert later[0] > earlier[0] + 0.05
    assert later[2] > earlier[2] + 0.05


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
def test_a_target_that_does_not_move_fails_loudly_or_is_left_out(
    method: str, tiny_gpt2: LanguageModel
) -> None:
    before = weights(tiny_gpt2)
    stuck = {"updates": 1, "learning_rate": 1e-9, "clamp": 1e-6}
    with pytest.raises(TargetError, match=r"We travel to France.*'Rome'.*did not move"):
        editor(method, target=stuck).edit(tiny_gpt2, REQUESTS)
    with pytest.raises(TargetError, match="no request could be carried out"):
        editor(method, target=stuck, keep_going=True).edit(tiny_gpt2, REQUESTS)
    assert same(before, weights(tiny_gpt2))


@methods
def test_a_config_refuses_what_it_does_not_know(method: str) -> None:
    with pytest.raises(ConfigError, match="lamda"):
        EDITORS[method].config.from_dict({"lamda": 3})
    with pytest.raises(ConfigError, match="clmp"):
        EDITORS[method].config.from_dict({"target": {"clmp": 3}})
    with pytest.raises(ConfigError, match="ascending"):
        EDITORS[method].config.from_dict({"layers": [2, 1]})


@methods
def test_a_config_survives_its_record(method: str) -> None:
    entry = EDITORS[method]
    config = entry.config.from_dict({"layers": [1, 2], "target": {"clamp": 2.0}})
    assert entry.config.from_dict(config.to_dict()) == config


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
        assert probability(tiny_gpt2, REQUESTS[0]) > earlier + 1


@methods
@pytest.mark.parametrize("spread", ["even", "root"])
@pytest.mark.parametrize("place", ["mlp", "block"])
def test_any_objective_runs_with_any_distribution_and_target(
    method: str, tiny_gpt2: LanguageModel, spread: str, place: str
) -> None:
    target = SMALL | {"place": place}
    edit = editor(method, layers=[0, 1, 2], spread=spread, target=target).edit(
        tiny_gpt2, REQUESTS[:2]
    )
    assert len(edit.changes) == 3
    earlier = probability(tiny_gpt2, REQUESTS[0])
    with edit.applied(tiny_gpt2):
        assert probability(tiny_gpt2, REQUESTS[0]) > earlier + 1
