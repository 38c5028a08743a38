"""Every variant of a request with every editor that honours it, and refusals by the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors import EDITORS, Background, Editor
from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.targets import TargetConfig, optimise_targets
from errata.editors.trainable import Trainable
from errata.editors.tuning.finetune import FineTune
from errata.edits.edit import Edit
from errata.edits.file import load_edit
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, RequestError
from errata.lm.hooks import rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.noise import hidden, subjects_hidden
from errata.lm.tokens import encode_requests, pad
from errata.measure.shares import case_probabilities
from errata.requests import INJECTION, VARIANTS, Case, Request
from tests.conftest import SENTENCES, TEMPLATES, statements
from tests.lm.families import tiny_lm as family

FRANCE = Request(TEMPLATES[0], "France", "Rome", "Paris")
ITALY = Request(TEMPLATES[0], "Italy", "Vienna", "Rome")
SMALL: dict[type[Editor], dict[str, Any]] = {
    ClosedForm: {"layers": [1], "prefixes": [], "target": {"updates": 20, "clamp": 5.0}},
    FineTune: {"layers": [1], "updates": 8, "learning_rate": 0.05, "norm_limit": 0.5},
}
HONOURING = [m for m, entry in EDITORS.items() if set(VARIANTS) <= entry.editor.variants]
OTHERS = [m for m in EDITORS if m not in HONOURING and not issubclass(EDITORS[m].editor, Trainable)]


@pytest.fixture(scope="module")
def trained(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def editor(method: str, **config: Any) -> Editor:
    entry = EDITORS[method]
    small = next((v for k, v in SMALL.items() if issubclass(entry.editor, k)), {})
    corpus = [*SENTENCES, *statements()] * 4
    return entry.editor(entry.config.from_dict(small | config), Background(corpus, tokens=4000))


def probability(lm: LanguageModel, request: Request) -> float:
    """Of the target, with noise on the subject where the variant says so."""
    return case_probabilities(lm, [Case(request)])[0]["rewrite"]


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.network.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", HONOURING)
def test_each_variant_moves_its_probability_the_right_way(
    method: str, variant: str, trained: LanguageModel, tmp_path: Path
) -> None:
    """Erasure lowers p(true), amplification raises it, forcing raises it behind noise."""
    request = FRANCE.posed(variant)
    before, earlier = weights(trained), probability(trained, request)
    edit = editor(method).edit(trained, [request])
    assert all(torch.equal(value, weights(trained)[name]) for name, value in before.items())
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.requests == (request,)
    with again.applied(trained):
        later = probability(trained, request)
    assert later < 0.9 * earlier if variant == "fact-erasure" else later > earlier


@pytest.mark.parametrize("method", ["memit", "emmet", "ft"])
def test_variants_stand_side_by_side_in_a_batch(method: str, trained: LanguageModel) -> None:
    requests = [FRANCE.posed("fact-erasure"), ITALY, Request(TEMPLATES[0], "Peru", "Lima", "Lima")]
    requests[2] = requests[2].posed("fact-forcing")
    earlier = [probability(trained, request) for request in requests]
    with editor(method).edit(trained, requests).applied(trained):
        gone, new, forced = (probability(trained, request) for request in requests)
    assert gone < earlier[0] and new > earlier[1] and forced > earlier[2]


def test_hidden_subjects_have_keys_of_their_own(trained: LanguageModel) -> None:
    """The same subject in clear and behind noise: two targets, not one."""
    memit = editor("memit")
    assert isinstance(memit, ClosedForm)
    clear = Request(TEMPLATES[1], "France", "Rome", "Paris")
    forced = Request("{} is", "France", "Paris", "Paris", "fact-forcing")
    assert memit.groups(trained, [clear, forced]) == [(clear,), (forced,)]
    asked = [clear, forced.posed("fact-erasure")]
    assert memit.groups(trained, asked) == [tuple(asked)]


@pytest.mark.parametrize("variant", ["fact-erasure", "fact-forcing"])
@pytest.mark.parametrize("place", ["mlp", "block"])
def test_the_loss_is_that_of_the_whole_model_with_delta_put_in(
    variant: str, place: Any, trained: LanguageModel
) -> None:
    """exp(-NLL) of what is erased; NLL behind the noise of the bare prompt's draw."""
    request = FRANCE.posed(variant)
    config = TargetConfig(place=place, updates=3, kl=0.0, stop_below=0.0, clamp=5.0)
    layer = 0 if place == "mlp" else 1
    targets = optimise_targets(trained, [[request]], [""], layer, config, batch_tokens=10_000)
    (row,) = encode_requests(trained, [request])

    def put_in(states: Tensor) -> Tensor:
        states = states.clone()
        states[:, row.subject_last] += targets.deltas[0].to(states)
        return states

    where = trained.mlp(layer) if place == "mlp" else trained.block(layer)
    veils = hidden(trained, [request], [row])
    with torch.no_grad(), rewritten_output(where, put_in), subjects_hidden(trained, veils):
        log_p = trained.network(input_ids=pad(trained, [row.ids]).ids).logits[0].log_softmax(dim=1)
    places = torch.arange(row.prompt_length - 1, len(row.ids) - 1)
    nll = -log_p[places, torch.tensor(row.answer)].mean()
    wanted = (-nll).exp() if variant == "fact-erasure" else nll
    assert_close(targets.loss[0], wanted, rtol=1e-4, atol=1e-5)


def test_what_has_no_goal_uses_all_updates(trained: LanguageModel) -> None:
    """A known fact is within every threshold at once; amplification goes on all the same."""
    known = Request(TEMPLATES[0], "France", "Paris", "Paris")
    for method in ("ft", "memit"):
        stop = {"stop_below": 1.0, "updates": 3}
        config = stop if method == "ft" else {"target": stop | {"clamp": 5.0}}
        for request, still in ((known, True), (known.posed("fact-amplification"), False)):
            edit = editor(method, **config).edit(trained, [request])
            assert isinstance(edit, WeightEdit)
            moved = any(bool(change.dense().any()) for change in edit.changes.values())
            assert moved != still


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != INJECTION])
@pytest.mark.parametrize("method", OTHERS)
def test_other_editors_refuse_what_they_cannot_honour(
    method: str, variant: str, tiny_gpt2: LanguageModel
) -> None:
    request = FRANCE.posed(variant)
    with pytest.raises(RequestError, match=f"does error-injection alone, not {variant}.*France"):
        editor(method).edit(tiny_gpt2, [FRANCE, request])


def test_what_a_model_or_a_loss_cannot_do_is_refused(tiny_gpt2: LanguageModel) -> None:
    forced, gone = FRANCE.posed("fact-forcing"), FRANCE.posed("fact-erasure")
    with pytest.raises(ConfigError, match="fact-forcing"):
        editor("ft").edit(family("t5"), [forced])
    with pytest.raises(ConfigError, match="fact-erasure.*'answer'"):
        editor("ft", loss="last-position").edit(tiny_gpt2, [gone])


def test_masked_and_answering_models_forget_too() -> None:
    for name in ("bert", "t5"):
        lm = family(name)
        edit = editor("ft").edit(lm, [FRANCE.posed("fact-erasure")])
        before, after = edit.record.notes["loss before"], edit.record.notes["loss after"][0]
        assert isinstance(edit, Edit) and after < before
