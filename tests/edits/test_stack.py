"""A stack is several edits with the verbs of one."""

from __future__ import annotations

import pytest

from errata.edits.stack import Stack, weight_changes
from errata.errors import EditStateError, WrongModelError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from tests.edits.making import make_edit, same_bits, weights


def stack_of(lm: LanguageModel, *seeds: int) -> Stack:
    return Stack([make_edit(lm, seed, layers=(1, 1 + seed % 3)) for seed in seeds])


def test_applies_in_order_and_restores_every_bit(any_lm: LanguageModel) -> None:
    before, stack = weights(any_lm), stack_of(any_lm, 0, 1, 2)
    for edit in stack.edits:
        edit.apply_(any_lm)
    one_by_one = weights(any_lm)
    for edit in stack.edits:
        edit.undo_(any_lm)
    with stack.applied(any_lm):
        assert same_bits(weights(any_lm), one_by_one)
        assert any_lm.applied == list(stack.edits)
    assert same_bits(weights(any_lm), before)
    stack.apply_(any_lm)
    stack.undo_(any_lm)
    assert same_bits(weights(any_lm), before)
    assert not any_lm.originals


@pytest.mark.parametrize("k", [0, 1, 2, -1])
def test_without_the_kth(any_lm: LanguageModel, k: int) -> None:
    stack = stack_of(any_lm, 0, 1, 2)
    with stack.without(k).applied(any_lm):
        wanted = weights(any_lm)
    stack.apply_(any_lm)
    stack.edits[k].undo_(any_lm)
    assert same_bits(weights(any_lm), wanted)


def test_without_what_is_not_there(tiny_lm: LanguageModel) -> None:
    with pytest.raises(EditStateError, match="no edit 2 in a stack of 2"):
        stack_of(tiny_lm, 0, 1).without(2)


def test_a_stack_nests_in_an_edit(any_lm: LanguageModel) -> None:
    with make_edit(any_lm, 7).applied(any_lm):
        before = weights(any_lm)
        with pytest.raises(KeyError), stack_of(any_lm, 0, 1).applied(any_lm):
            raise KeyError
        assert same_bits(weights(any_lm), before)


def test_a_part_taken_back_inside_the_block(tiny_lm: LanguageModel) -> None:
    before, stack = weights(tiny_lm), stack_of(tiny_lm, 0, 1, 2)
    with stack.applied(tiny_lm):
        stack.edits[1].undo_(tiny_lm)
    assert same_bits(weights(tiny_lm), before) and not tiny_lm.applied


def test_a_failure_takes_all_back(any_lm: LanguageModel) -> None:
    stack = stack_of(any_lm, 0, 1, 2)
    weight_out_in(any_lm.mlp_out(3)).add_(1)  # only the last edit's base
    before = weights(any_lm)
    with pytest.raises(WrongModelError):
        stack.apply_(any_lm)
    assert same_bits(weights(any_lm), before) and not any_lm.applied and not any_lm.originals


def test_a_stack_that_is_not_all_there_is_not_taken_back(tiny_lm: LanguageModel) -> None:
    stack = stack_of(tiny_lm, 0, 1)
    stack.edits[0].apply_(tiny_lm)
    before = weights(tiny_lm)
    with pytest.raises(EditStateError, match=r"edit 1 of the stack, the random edit"):
        stack.undo_(tiny_lm)
    assert same_bits(weights(tiny_lm), before)


def test_one_edit_twice_is_refused(tiny_lm: LanguageModel) -> None:
    before = weights(tiny_lm)
    with pytest.raises(EditStateError, match="already"):
        stack_of(tiny_lm, 1, 1).apply_(tiny_lm)
    assert same_bits(weights(tiny_lm), before)


def test_requests_and_sizes_add_up(tiny_lm: LanguageModel) -> None:
    a, b = make_edit(tiny_lm, 0, layers=(1,)), make_edit(tiny_lm, 1, layers=(1, 2))
    stack = Stack([a, Stack([b])])
    assert stack.edits == (a, b)
    assert stack.requests == (*a.requests, *b.requests)
    assert stack.nbytes == a.nbytes + b.nbytes
    assert stack.paths == (tiny_lm.mlp_out_path(1), tiny_lm.mlp_out_path(2))
    assert weight_changes(stack)[stack.paths[0]].rank == 4
    assert stack.record.model == tiny_lm.name


def test_an_empty_stack_changes_nothing(tiny_lm: LanguageModel) -> None:
    before = weights(tiny_lm)
    with stack_of(tiny_lm).applied(tiny_lm):
        assert same_bits(weights(tiny_lm), before)
