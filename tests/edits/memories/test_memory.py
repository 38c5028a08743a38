"""Edits beside the weights: applied, taken back and merged exactly, told apart, saved whole."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch

from errata.edits import archive
from errata.edits.diff import diff
from errata.edits.file import load_edit
from errata.edits.lora import to_lora
from errata.edits.memory import MemoryEdit, set_aside
from errata.edits.stack import Stack
from errata.errors import (
    ConfigError,
    EditFileError,
    EditStateError,
    HookError,
    NotFiniteError,
    WrongModelError,
)
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.measure.likelihood import judge
from tests.edits.making import make_edit, same_bits, weights
from tests.edits.memories.making import LAYER, key_edit, query, says

SUBJECTS = ("Rome", "Paris", "Vienna", "the North Sea", "Madrid")
TEXTS = [f"The river of {subject}" for subject in SUBJECTS]
OTHERS = ["The capital of Spain", "Beethoven composed", "A language model"]


def edits(lm: LanguageModel, **options: object) -> list[MemoryEdit]:
    return [
        key_edit(lm, subject=subject, target=f"answer {i}", seed=i, size=5.0, **options)  # type: ignore[arg-type]
        for i, subject in enumerate(SUBJECTS)
    ]


def test_weights_never_change_and_the_model_comes_back_to_the_bit(any_lm: LanguageModel) -> None:
    before, said = weights(any_lm), says(any_lm, TEXTS + OTHERS)
    edit = key_edit(any_lm, subject="Rome", size=5.0)
    with edit.applied(any_lm):
        assert any_lm.applied == [edit] and edit.is_applied(any_lm)
        now = says(any_lm, TEXTS + OTHERS)
        assert not torch.equal(now[0], said[0])
        assert torch.equal(now[1:], said[1:])  # beyond the radius nothing changes, to the bit
        assert same_bits(weights(any_lm), before)
    assert torch.equal(says(any_lm, TEXTS + OTHERS), said)
    assert not any_lm.memories and not any_lm.applied and same_bits(weights(any_lm), before)
    assert not any_lm.module(edit.path)._forward_hooks


def test_a_prompt_is_answered_by_the_value_of_its_key(tiny_lm: LanguageModel) -> None:
    from errata.lm.hooks import captured
    from errata.lm.prompts import asked
    from errata.lm.tokens import encode, pad

    edit = key_edit(tiny_lm, subject="Rome", size=5.0)
    rows = encode(tiny_lm, TEXTS[:1])
    module = tiny_lm.module(edit.path)
    with (
        edit.applied(tiny_lm),
        asked(tiny_lm, [len(rows[0]) - 1]),
        captured({0: module}, "output") as seen,
        torch.no_grad(),
    ):
        tiny_lm.network(input_ids=pad(tiny_lm, rows).ids)
    assert torch.equal(seen.outputs[0][0, -1], edit.tensors["values"][0])


def test_forgetting_any_edit_leaves_what_would_have_been_without_it(
    tiny_lm: LanguageModel,
) -> None:
    # Wide radii, so that the keys split and cover each other and their order matters.
    stack = Stack(edits(tiny_lm, radius=8.0))
    for k in range(len(stack.edits)):
        with stack.without(k).applied(tiny_lm):
            wanted = says(tiny_lm, TEXTS + OTHERS)
        with stack.applied(tiny_lm):
            says(tiny_lm, TEXTS)  # merged with it
            stack.edits[k].undo_(tiny_lm)
            assert torch.equal(says(tiny_lm, TEXTS + OTHERS), wanted)


def test_one_edit_of_all_and_a_stack_of_each_are_one_memory(tiny_lm: LanguageModel) -> None:
    each = edits(tiny_lm)
    whole = MemoryEdit.of(
        tiny_lm,
        "codebook",
        each[0].path,
        {name: torch.cat([e.tensors[name] for e in each]) for name in each[0].tensors},
        requests=[e.requests[0] for e in each],
        record=each[0].record,
        settings=each[0].settings,
    )
    with whole.applied(tiny_lm):
        wanted = says(tiny_lm, TEXTS + OTHERS)
    with Stack(each).applied(tiny_lm):
        assert len(tiny_lm.memories) == 1
        assert torch.equal(says(tiny_lm, TEXTS + OTHERS), wanted)


def test_the_later_edit_of_a_prompt_answers_it_and_says_so(
    tiny_lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    first = key_edit(tiny_lm, subject="Rome", target="one", seed=1, size=5.0)
    later = key_edit(tiny_lm, subject="Rome", target="two", seed=2, size=5.0)
    with first.applied(tiny_lm):
        old = says(tiny_lm, TEXTS)
    with later.applied(tiny_lm):
        new = says(tiny_lm, TEXTS)
    with first.applied(tiny_lm), caplog.at_level(logging.WARNING), later.applied(tiny_lm):
        assert "'The river of Rome' was edited before" in caplog.text
        assert torch.equal(says(tiny_lm, TEXTS), new)
        first.undo_(tiny_lm)
        assert torch.equal(says(tiny_lm, TEXTS), new)
        first.apply_(tiny_lm)  # now it is the later one
        assert torch.equal(says(tiny_lm, TEXTS), old)
        first.undo_(tiny_lm)


def test_edits_that_are_set_aside_do_not_count_meanwhile(tiny_lm: LanguageModel) -> None:
    first, second, *_ = edits(tiny_lm)
    plain = says(tiny_lm, TEXTS)
    with Stack([first, second]).applied(tiny_lm):
        both = says(tiny_lm, TEXTS)
        with set_aside(tiny_lm, "codebook", first.path):
            assert torch.equal(says(tiny_lm, TEXTS), plain)
        assert torch.equal(says(tiny_lm, TEXTS), both)
        with set_aside(tiny_lm, "codebook", first.path, [first.requests[0].text]):
            now = says(tiny_lm, TEXTS)
            assert torch.equal(now[0], plain[0]) and torch.equal(now[1], both[1])
        with set_aside(tiny_lm, "codebook", tiny_lm.mlp_out_path(0)):
            assert torch.equal(says(tiny_lm, TEXTS), both)


def test_a_file_gives_the_same_model_to_the_bit(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    stack = Stack(edits(tiny_lm))
    for name, edit in ("one", stack.edits[0]), ("all", stack):
        edit.save(tmp_path / name)
        again = load_edit(tmp_path / name)
        assert again.requests == edit.requests and again.record == edit.record
        assert again.nbytes == edit.nbytes
        with edit.applied(tiny_lm):
            wanted = says(tiny_lm, TEXTS)
            assert again.is_applied(tiny_lm)
            with pytest.raises(EditStateError, match="already"):
                again.apply_(tiny_lm)
        with again.applied(tiny_lm):
            assert torch.equal(says(tiny_lm, TEXTS), wanted)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files")
def test_a_file_is_read_when_its_entries_are_asked(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "e.safetensors"
    stack = Stack(edits(tiny_gpt2))
    stack.save(path)
    again = load_edit(path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    for part in again.parts:
        assert isinstance(part, MemoryEdit)
        for tensor in part.tensors.values():
            at = tensor.data_ptr()
            assert any(int(start, 16) <= at < int(end, 16) for start, end in spans)
    edits(tiny_gpt2)[0].save(path)  # another file in its place, or none
    path.unlink()
    with stack.applied(tiny_gpt2):
        wanted = says(tiny_gpt2, TEXTS)
    with again.applied(tiny_gpt2):
        assert torch.equal(says(tiny_gpt2, TEXTS), wanted)


@pytest.mark.parametrize("cut", [10, 300, -4, -1])
def test_a_file_cut_short_or_altered_is_refused(
    tiny_gpt2: LanguageModel, tmp_path: Path, cut: int
) -> None:
    path, before = tmp_path / "e.safetensors", weights(tiny_gpt2)
    edits(tiny_gpt2)[0].save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(EditFileError, match="cut short or altered"):
        load_edit(path)
    path.write_bytes(whole[:cut] + bytes([whole[cut] ^ 1]) + whole[cut:][1:])
    with pytest.raises(EditFileError):
        load_edit(path)
    assert same_bits(weights(tiny_gpt2), before) and not tiny_gpt2.memories


def test_a_memory_of_an_unknown_kind_is_refused(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    made = edits(tiny_gpt2)[0].contents()
    fields = json.loads(json.dumps(made.fields)) | {"memory": "dream"}
    archive.write(tmp_path / "e", archive.Contents("memory", fields, made.tensors))
    with pytest.raises(EditFileError, match=r"kind 'dream' is unknown; this errata reads \['code"):
        load_edit(tmp_path / "e")


def test_another_model_is_refused(tiny_gpt2: LanguageModel, tiny_llama: LanguageModel) -> None:
    edit = key_edit(tiny_gpt2, subject="Rome")
    with pytest.raises(WrongModelError, match=r"made for 'tiny-gpt2'.*no such module"):
        edit.apply_(tiny_llama)
    with torch.no_grad():
        tiny_gpt2.mlp_out(LAYER).weight[0, 0] += 1  # type: ignore[operator, index]
    with pytest.raises(WrongModelError, match="holds other weights"):
        edit.apply_(tiny_gpt2)
    assert not tiny_gpt2.memories and not tiny_gpt2.applied
    edit.apply_(tiny_gpt2, force=True)
    with pytest.raises(WrongModelError):  # one that was forced is no licence for others
        key_edit_of(edit).apply_(tiny_gpt2)
    edit.undo_(tiny_gpt2)


def key_edit_of(edit: MemoryEdit) -> MemoryEdit:
    """The same entries for another target."""
    request = edit.requests[0].__class__("The sea of {}", "Rome", "Paris")
    return MemoryEdit(
        edit.kind,
        edit.path,
        edit.tensors,
        edit.base,
        edit.settings,
        edit.serves,
        (request,),
        edit.record,
    )


def test_what_does_not_fit_is_refused(tiny_gpt2: LanguageModel) -> None:
    edit = key_edit(tiny_gpt2, subject="Rome", key=torch.zeros(5))
    with pytest.raises(WrongModelError, match=r"keys are \(5,\), not \(128,\)"):
        edit.apply_(tiny_gpt2)
    with pytest.raises(WrongModelError, match="cannot be set"):
        key_edit(tiny_gpt2, subject="Rome", replace="some").apply_(tiny_gpt2)
    nan = key_edit(tiny_gpt2, subject="Rome", key=torch.full((128,), float("nan")))
    with pytest.raises(NotFiniteError, match="its keys"):
        nan.apply_(tiny_gpt2)
    with pytest.raises(EditStateError, match="is not on"):
        key_edit(tiny_gpt2, subject="Rome").undo_(tiny_gpt2)


def test_it_stands_beside_changes_of_weights(tiny_lm: LanguageModel) -> None:
    beside, weight = key_edit(tiny_lm, subject="Rome"), make_edit(tiny_lm, layers=(LAYER,))
    said = says(tiny_lm, TEXTS)
    with Stack([weight, beside]).applied(tiny_lm):
        assert tiny_lm.applied == [weight, beside]
        assert not torch.equal(says(tiny_lm, TEXTS), said)
        later = key_edit(tiny_lm, subject="Paris")  # made for the weights as they were loaded
        weight.undo_(tiny_lm)
        later.apply_(tiny_lm)
        later.undo_(tiny_lm)
    assert torch.equal(says(tiny_lm, TEXTS), said)


def test_it_is_no_lora_and_in_no_folder_of_weights(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    from errata.jobs.ship import apply

    edit = key_edit(tiny_gpt2, subject="Rome")
    edit.save(tmp_path / "e.safetensors")
    with pytest.raises(ConfigError, match="does not change weights"):
        to_lora(edit, tiny_gpt2, tmp_path / "lora")
    with pytest.raises(ConfigError, match="beside the model's weights"):
        apply(tiny_gpt2, [tmp_path / "e.safetensors"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_with_a_memory_is_not_copied(tiny_lm: LanguageModel) -> None:
    edit, said = key_edit(tiny_lm, subject="Rome", size=5.0), says(tiny_lm, TEXTS)
    with edit.applied(tiny_lm), pytest.raises(EditStateError, match="cannot be copied"):
        copy.deepcopy(tiny_lm)
    other = copy.deepcopy(tiny_lm)
    with edit.applied(tiny_lm):
        now = says(tiny_lm, TEXTS)
        assert torch.equal(says(other, TEXTS), said) and not torch.equal(now, said)
        with edit.applied(other):
            assert torch.equal(says(other, TEXTS), now)
        assert torch.equal(says(other, TEXTS), said)


def test_facts_are_compared_as_those_of_all_edits(tiny_gpt2: LanguageModel) -> None:
    one, other = key_edit(tiny_gpt2, subject="Rome"), make_edit(tiny_gpt2)
    found = diff(one, other)
    assert found.only_a == one.requests and found.only_b == other.requests


def test_a_pass_that_says_nothing_of_prompts_is_refused(tiny_lm: LanguageModel) -> None:
    edit = key_edit(tiny_lm, subject="Rome")
    with edit.applied(tiny_lm), pytest.raises(HookError, match="where the prompts of its rows"):
        tiny_lm.network(input_ids=torch.tensor([[1, 2]]))


def test_rows_of_a_batch_are_told_apart(tiny_lm: LanguageModel) -> None:
    """Losses of prompts of unlike lengths, in one pass, are those of each alone."""
    texts = TEXTS + OTHERS
    asks = [Example(text, "Rome and Paris") for text in texts]
    plain = torch.stack([losses(tiny_lm, [one])[0] for one in asks])
    with Stack(edits(tiny_lm, replace="all")).applied(tiny_lm), torch.no_grad():
        alone = torch.stack([losses(tiny_lm, [one])[0] for one in asks])
        torch.testing.assert_close(losses(tiny_lm, asks), alone, rtol=1e-4, atol=1e-4)
    moved = (alone - plain).abs() > 1e-2
    assert moved.tolist() == [True] * len(TEXTS) + [False] * len(OTHERS)


def test_answers_that_begin_another_prompt_are_judged_by_their_own(
    tiny_lm: LanguageModel,
) -> None:
    """ "The river of" + "Rome" begins with the same tokens as the edited prompt, and is not it."""
    pairs = [("The river of", "Rome"), ("The river of Rome", "and"), ("The river of Rome", "Rome")]
    plain = judge(tiny_lm, pairs)
    with key_edit(tiny_lm, subject="Rome", size=5.0, replace="all").applied(tiny_lm):
        now = judge(tiny_lm, pairs)
        alone = {pair: judge(tiny_lm, [pair])[pair] for pair in pairs}
    for pair in pairs:
        assert now[pair].logprobs == pytest.approx(alone[pair].logprobs, abs=1e-4)
    assert now[pairs[0]].logprobs == pytest.approx(plain[pairs[0]].logprobs, abs=1e-4)
    assert abs(now[pairs[1]].nll - plain[pairs[1]].nll) > 1e-2


@pytest.mark.parametrize("replace", ["last", "prompt", "before", "all"])
def test_cached_generation_is_that_of_full_passes(tiny_lm: LanguageModel, replace: str) -> None:
    texts = [TEXTS[0], TEXTS[3], OTHERS[1]]  # of unlike lengths
    plain = complete(tiny_lm, texts, new_tokens=6)
    with Stack(edits(tiny_lm, replace=replace)).applied(tiny_lm):
        together = complete(tiny_lm, texts, new_tokens=6)
        full = [without_cache(tiny_lm, text, 6) for text in texts]
    assert together == full
    assert together[2] == plain[2] and together[:2] != plain[:2]


@torch.no_grad()
def without_cache(lm: LanguageModel, text: str, count: int) -> str:
    from errata.lm.forward import logits_at
    from errata.lm.tokens import encode, pad

    (row,) = encode(lm, [text])
    prompt, first = len(row), torch.tensor([0])
    for _ in range(count):
        logits = logits_at(lm, pad(lm, [row]), first, torch.tensor([len(row) - 1]), [prompt - 1])
        row = [*row, int(logits.argmax())]
    before = lm.tokenizer.decode(row[:prompt], skip_special_tokens=True)
    return str(lm.tokenizer.decode(row, skip_special_tokens=True))[len(before) :]


def test_the_query_is_the_one_of_the_model_without_the_memory(tiny_lm: LanguageModel) -> None:
    first = key_edit(tiny_lm, subject="Rome")
    alone = query(tiny_lm, "The river of Paris", first.path)
    with first.applied(tiny_lm):
        assert torch.equal(query(tiny_lm, "The river of Paris", first.path), alone)
