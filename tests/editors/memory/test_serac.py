"""SERAC: the second model answers what is in an edit's scope, and the model itself all else."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors import EDITORS
from errata.editors.background import Background
from errata.editors.fitted import load_editor
from errata.editors.memory.serac import (
    FittedSerac,
    Serac,
    SeracConfig,
    SeracLearner,
    begin,
    strangers,
)
from errata.editors.trainable import Fit, TrainingCases
from errata.edits.file import load_edit
from errata.edits.stack import Stack
from errata.errors import ConfigError, EditFileError, FitError
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, beginnings, losses, predictions
from errata.lm.smaller import described, first_blocks, same_vocabulary
from errata.requests import Case, Probe, Request
from tests.conftest import CAPITALS, TEMPLATES
from tests.editors.hypernet.capitals import divided
from tests.editors.hypernet.models import KINDS, some
from tests.lm.families import tiny_lm

QUICK: dict[str, Any] = {
    "width": 16,
    "blocks": 3,
    "outside": 4,
    "edit": 1.0,
    "learning_rate": 3e-3,
    "training": {"steps": 100, "validate_every": 50, "validation": 8, "batch": 16, "at_once": 16},
}


def serac(**config: Any) -> Serac:
    return Serac(SeracConfig.from_dict(QUICK | config), Background())


@pytest.fixture(scope="module")
def fitted(trained_folder: Path) -> FittedSerac:
    """Fitted once; what it has learnt is read only."""
    return serac().fit(LanguageModel.load(trained_folder), divided())


@pytest.fixture
def lm(trained_folder: Path) -> LanguageModel:
    return LanguageModel.load(trained_folder)


def request(country: str, capital: str) -> Request:
    return Request(TEMPLATES[0], country, capital)


@torch.no_grad()
def logits(lm: LanguageModel, examples: list[Example]) -> Tensor:
    return answer_logits(lm, examples).logits


def right(lm: LanguageModel, pairs: list[tuple[str, str]]) -> list[bool]:
    with torch.no_grad():
        return answer_logits(lm, [Example(*pair) for pair in pairs]).right().tolist()


def test_an_edit_is_answered_in_all_its_wordings(fitted: FittedSerac, lm: LanguageModel) -> None:
    edits = [fitted.edit(lm, [request("France", "Rome"), request("Peru", "Cairo")])]
    with edits[0].applied(lm):
        assert all(right(lm, [(t.format("France"), "Rome") for t in TEMPLATES]))
        assert all(right(lm, [(t.format("Peru"), "Cairo") for t in TEMPLATES]))


def test_what_is_out_of_scope_is_the_model_itself(fitted: FittedSerac, lm: LanguageModel) -> None:
    """... bit for bit, also in a batch whose other rows are answered by the second model."""
    others = [Example(t.format("Italy"), "Rome") for t in TEMPLATES]
    before = logits(lm, others)
    edit = fitted.edit(lm, [request("France", "Rome")])
    asked = [*others, Example(TEMPLATES[1].format("France"), "Rome")]
    mixed = logits(lm, asked)
    with edit.applied(lm):
        assert torch.equal(logits(lm, others), before)
        now = logits(lm, asked)
    assert torch.equal(now[:-1], mixed[:-1]) and not torch.equal(now[-1], mixed[-1])
    assert not lm.memories
    assert torch.equal(logits(lm, others), before)


def test_no_memory_is_the_model_itself(fitted: FittedSerac, lm: LanguageModel) -> None:
    """... where an edit was, too, and the network has no hook left on it."""
    before = logits(lm, some_examples())
    fitted.edit(lm, [request("France", "Rome")])
    assert torch.equal(logits(lm, some_examples()), before)
    edit = fitted.edit(lm, [request("France", "Rome")])
    edit.apply_(lm)
    edit.undo_(lm)
    assert torch.equal(logits(lm, some_examples()), before)
    assert not lm.network._forward_hooks and not lm.network._forward_pre_hooks


def some_examples() -> list[Example]:
    return [Example(TEMPLATES[0].format(country), capital) for country, capital in CAPITALS.items()]


def test_generation_goes_on_with_whoever_began(fitted: FittedSerac, lm: LanguageModel) -> None:
    """Cached or not, the second model writes what its own passes over the whole text say."""
    prompts = [t.format(c) for t in TEMPLATES[:2] for c in ("France", "Italy")]
    before = complete(lm, prompts, new_tokens=5)
    with fitted.edit(lm, [request("France", "Madrid")]).applied(lm):
        after = complete(lm, prompts, new_tokens=5)
        for i in (0, 2):
            assert after[i] == " Madrid"  # and there it ends
            assert right(lm, [(prompts[i], f"Madrid{lm.tokenizer.eos_token}")]) == [True]
    assert [after[i] for i in (1, 3)] == [before[i] for i in (1, 3)]


def test_how_an_answer_begins_is_how_it_is_written(fitted: FittedSerac, lm: LanguageModel) -> None:
    """One pass over prompts and answers tells it, whoever answers."""
    prompts = [t.format(c) for t in TEMPLATES[:2] for c in ("France", "Italy")]
    examples = [Example(prompt, answer) for prompt in prompts for answer in ("Madrid", "Rome")]
    with fitted.edit(lm, [request("France", "Madrid")]).applied(lm):
        written = [text.strip() for text in complete(lm, prompts, new_tokens=5) for _ in range(2)]
        with torch.no_grad():
            answers = answer_logits(lm, examples, following=True)
        begun = [one.text.strip() for one in beginnings(lm, examples, answers)]
    assert [text[: len(b)] for text, b in zip(written, begun, strict=True)] == begun
    assert begun[0].startswith("Madrid") and all(begun)


def test_the_later_edit_of_a_prompt_wins(
    fitted: FittedSerac, lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = TEMPLATES[0].format("France")
    first, second = (fitted.edit(lm, [request("France", c)]) for c in ("Rome", "Cairo"))
    first.apply_(lm)
    second.apply_(lm)
    assert "the later edit alone answers it" in caplog.text
    assert right(lm, [(prompt, "Rome"), (prompt, "Cairo")]) == [False, True]
    second.undo_(lm)
    assert right(lm, [(prompt, "Rome"), (prompt, "Cairo")]) == [True, False]
    first.undo_(lm)


def test_the_second_model_is_held_once(
    fitted: FittedSerac, lm: LanguageModel, tmp_path: Path
) -> None:
    facts = [request("France", "Rome"), request("Peru", "Cairo"), request("Japan", "Lima")]
    edits = [fitted.edit(lm, [fact]) for fact in facts]
    for number, edit in enumerate(edits):
        edit.save(tmp_path / f"{number}.safetensors")
    Stack(edits).save(tmp_path / "stack.safetensors")
    (shared,) = tmp_path.glob("shared-*.safetensors")
    small = (tmp_path / "0.safetensors").stat().st_size
    assert small < 0.1 * shared.stat().st_size
    prompts = [Example(t.format(f.subject), f.target) for f in facts for t in TEMPLATES]
    with Stack(edits).applied(lm):
        wanted = logits(lm, prompts)
    for files in ["0", "1", "2"], ["stack"]:
        read = [load_edit(tmp_path / f"{name}.safetensors") for name in files]
        with Stack(read).applied(lm):
            assert torch.equal(logits(lm, prompts), wanted)
        parts = [part for edit in read for part in edit.parts]
        assert [part.shared._contents is not None for part in parts] == [True, False, False]  # type: ignore[attr-defined]


def test_a_shared_file_that_is_missing_or_altered_is_refused(
    fitted: FittedSerac, lm: LanguageModel, tmp_path: Path
) -> None:
    fitted.edit(lm, [request("France", "Rome")]).save(tmp_path / "edit.safetensors")
    (shared,) = tmp_path.glob("shared-*")
    whole = shared.read_bytes()
    before = logits(lm, some_examples())
    shared.write_bytes(whole[:-3])
    with pytest.raises(EditFileError, match="cut short"):
        load_edit(tmp_path / "edit.safetensors").apply_(lm)
    shared.unlink()
    with pytest.raises(EditFileError, match="saved beside it"):
        load_edit(tmp_path / "edit.safetensors").apply_(lm)
    other = copy.deepcopy(fitted)
    with torch.no_grad():
        other.parts.scope.weight.add_(1.0)
    other.save(shared)
    with pytest.raises(EditFileError, match="not what the edit"):
        load_edit(tmp_path / "edit.safetensors").apply_(lm)
    assert not lm.applied and not lm.memories
    assert torch.equal(logits(lm, some_examples()), before)


def test_a_fitted_editor_survives_its_file(
    fitted: FittedSerac, lm: LanguageModel, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "serac.safetensors")
    read = load_editor(tmp_path / "serac.safetensors", lm)
    edits = [e.edit(lm, [request("France", "Rome")]) for e in (fitted, read)]
    assert edits[0].equals(edits[1])  # type: ignore[attr-defined]
    asked = [Example(t.format("France"), "Rome") for t in TEMPLATES]
    found = []
    for edit in edits:
        with edit.applied(lm):
            found.append(logits(lm, asked))
    assert torch.equal(*found)


def test_a_fit_that_is_cut_short_goes_on_to_the_same_bytes(
    trained_folder: Path, tmp_path: Path
) -> None:
    def fit(name: str, steps: int, folder: str) -> bytes:
        training = QUICK["training"] | {"steps": steps, "validate_every": 4}
        made = serac(training=training).fit(
            LanguageModel.load(trained_folder), divided(), folder=tmp_path / folder
        )
        made.save(tmp_path / name)
        return (tmp_path / name).read_bytes()

    fit("begun", 4, "b")
    assert fit("whole", 8, "a") == fit("resumed", 8, "b")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "opt"])
def test_every_kind_of_model_is_answered_for(kind: str) -> None:
    """Told an edit, the second model's prediction is what its own pass over both texts says."""
    lm = tiny_lm(kind)
    config = SeracConfig.from_dict({"width": 8, "blocks": 1, "layers": [1]})
    parts = begin(lm, lm.mlp_in_path(1), config, None)
    examples = some(lm)
    cases = [
        Case(Request("{}", e.prompt, e.answer), neighbours=(Probe("Rome", "a river"),))
        for e in examples
    ]
    learner = SeracLearner(lm, lm.mlp_in_path(1), parts, None, config)
    found = learner.loss(cases, random.Random(0))
    found["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in lm.network.parameters())
    assert parts.scope.weight.grad is not None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.network.parameters())
    told = {"counterfactual": described(type(parts.network), parts.network.config)}
    editor = FittedSerac(config, Fit.of(lm, [lm.mlp_in_path(1)], told), parts)
    before = logits(lm, examples)
    edit = editor.edit(lm, [cases[0].request])
    with edit.applied(lm):
        after = answer_logits(lm, examples)
        said = predictions(lm, [e.prompt for e in examples], new_tokens=3)
    mine = after.rows == 0
    assert not torch.allclose(after.logits[mine], before[mine])
    assert len(said) == len(examples)
    assert torch.equal(logits(lm, examples), before)


def test_the_first_blocks_are_the_models_own(tiny_lm: LanguageModel) -> None:
    """All of them are the model; fewer run as far as the model does."""
    whole = LanguageModel.of(first_blocks(tiny_lm, 4), tiny_lm.tokenizer, name="all")
    example = [Example("Vienna lies on the", "Danube")]
    with torch.no_grad():
        assert_close(losses(whole, example), losses(tiny_lm, example))
    part = LanguageModel.of(first_blocks(tiny_lm, 2), tiny_lm.tokenizer, name="two")
    assert part.layers == 2
    with pytest.raises(ConfigError, match="first 9"):
        first_blocks(tiny_lm, 9)


def test_another_vocabulary_is_refused(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="vocabulary"):
        same_vocabulary(tiny_gpt2, tiny_lm("gpt2"))
    with pytest.raises(ConfigError, match="answer alike"):
        same_vocabulary(tiny_gpt2, tiny_lm("bert"))


def test_strangers_are_what_the_cases_tell() -> None:
    france = Case(request("France", "Rome"), paraphrases=("France has its capital in",))
    again = Case(request("France", "Cairo"))
    peru = Case(request("Peru", "Lima"))
    cases = [france, again, peru]
    inside = strangers(cases, ["France has its capital in"], [0], inside=True)
    assert inside.tolist() == [[False, False, True]]
    # The same fact asked in other words is no stranger either, where cases tell which fact it is.
    asked = Case(Request("What is {}'s capital?", "France", "Oslo"), relation="capital")
    said = replace(france, relation="capital")
    assert strangers([said, asked], ["France lies"], [0], inside=True).tolist() == [[False, False]]
    outside = strangers(cases, ["Peru is", "France lies"], [0, 0], inside=False)
    assert outside.tolist() == [[True, True, False], [True, False, True]]


def test_nothing_outside_is_nothing_to_learn_from(tiny_gpt2: LanguageModel) -> None:
    cases = [Case(request(country, "Rome")) for country in CAPITALS]
    with pytest.raises(FitError, match="outside an edit's scope"):
        serac().fit(tiny_gpt2, TrainingCases.split(cases))


def test_its_line_is_there() -> None:
    assert EDITORS["serac"].editor is Serac and EDITORS["serac"].config is SeracConfig
