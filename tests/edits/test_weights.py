"""Weight edits: exact sums, exact restoration, refusals that leave the model alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.edits import weights as module
from errata.edits.file import load_edit
from errata.edits.weights import WeightEdit, base_hash
from errata.errors import EditStateError, NotFiniteError, WrongModelError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_hash, weight_out_in
from tests.edits.making import make_edit, same_bits, weights


def test_adds_the_change_and_nothing_else(any_lm: LanguageModel) -> None:
    before, edit = weights(any_lm), make_edit(any_lm)
    expected = {
        path: (weight_out_in(any_lm.module(path)).float() + change.to(dtype=torch.float32).dense())
        for path, change in edit.changes.items()
    }
    with edit.applied(any_lm):
        after = weights(any_lm)
        for path, wanted in expected.items():
            weight = weight_out_in(any_lm.module(path))
            torch.testing.assert_close(weight, wanted.to(any_lm.dtype))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{path}.weight" for path in edit.changes}


def test_applied_restores_every_bit(any_lm: LanguageModel) -> None:
    before = weights(any_lm)
    with make_edit(any_lm).applied(any_lm):
        assert not same_bits(weights(any_lm), before)
    assert same_bits(weights(any_lm), before)
    assert not any_lm.originals and not any_lm.applied


def test_applied_restores_after_an_exception(any_lm: LanguageModel) -> None:
    before = weights(any_lm)
    with pytest.raises(KeyError, match="inside"), make_edit(any_lm).applied(any_lm):
        raise KeyError("inside")
    assert same_bits(weights(any_lm), before)


def test_applied_nests(any_lm: LanguageModel) -> None:
    bare, a, b = weights(any_lm), make_edit(any_lm, 0), make_edit(any_lm, 1, layers=(2, 3))
    with a.applied(any_lm):
        with_a = weights(any_lm)
        with pytest.raises(KeyError), b.applied(any_lm):
            raise KeyError
        assert same_bits(weights(any_lm), with_a)
        assert any_lm.applied == [a]
    assert same_bits(weights(any_lm), bare)


def test_applied_keeps_what_others_did_to_the_weights(any_lm: LanguageModel) -> None:
    """Fine-tuning on top of an edit, say: outside the books, yet restored."""
    make_edit(any_lm, 0).apply_(any_lm)
    weight_out_in(any_lm.mlp_out(1)).add_(1)
    before = weights(any_lm)
    with make_edit(any_lm, 1).applied(any_lm):
        pass
    assert same_bits(weights(any_lm), before)


def test_an_edit_that_stays_outlives_the_block_that_it_was_applied_in(
    tiny_lm: LanguageModel,
) -> None:
    a, b = make_edit(tiny_lm, 0), make_edit(tiny_lm, 1)
    b.apply_(tiny_lm)
    only_b = weights(tiny_lm)
    b.undo_(tiny_lm)
    with a.applied(tiny_lm):
        b.apply_(tiny_lm)
    assert same_bits(weights(tiny_lm), only_b)


def test_taken_back_inside_the_block(tiny_lm: LanguageModel) -> None:
    before, edit = weights(tiny_lm), make_edit(tiny_lm)
    with edit.applied(tiny_lm):
        edit.undo_(tiny_lm)
    assert same_bits(weights(tiny_lm), before)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_kth_taken_back_is_as_if_it_had_never_been(any_lm: LanguageModel, k: int) -> None:
    bare = weights(any_lm)
    edits = [make_edit(any_lm, seed, layers=(1, 1 + seed)) for seed in range(3)]
    others = [edit for edit in edits if edit is not edits[k]]
    for edit in others:
        edit.apply_(any_lm)
    wanted = weights(any_lm)
    for edit in others:
        edit.undo_(any_lm)
    assert same_bits(weights(any_lm), bare)
    for edit in edits:
        edit.apply_(any_lm)
    edits[k].undo_(any_lm)
    assert same_bits(weights(any_lm), wanted)
    assert any_lm.applied == others
    for edit in others:
        edit.undo_(any_lm)
    assert same_bits(weights(any_lm), bare)
    assert not any_lm.originals


def test_the_originals_are_the_weights_as_loaded(tiny_lm: LanguageModel) -> None:
    path = tiny_lm.mlp_out_path(1)
    loaded = weight_out_in(tiny_lm.module(path)).clone()
    digest = base_hash(tiny_lm, path)
    make_edit(tiny_lm, 0).apply_(tiny_lm)
    later = make_edit(tiny_lm, 1)  # computed while another edit is on
    assert torch.equal(tiny_lm.originals[path], loaded)
    assert later.base[path] == digest == weight_hash(loaded)


def test_the_originals_are_hashed_once(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [make_edit(tiny_lm, seed) for seed in range(5)]
    hashed = []

    def counted(weight: Tensor) -> str:
        hashed.append(weight)
        return weight_hash(weight)

    monkeypatch.setattr(module, "weight_hash", counted)
    for edit in edits:
        edit.apply_(tiny_lm)
    assert len(hashed) == 2  # one a matrix


def test_applying_twice_is_refused(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    edit = make_edit(tiny_lm)
    edit.save(tmp_path / "e.safetensors")
    edit.apply_(tiny_lm)
    before = weights(tiny_lm)
    for again in (edit, edit.with_scores({"S": 1.0}), load_edit(tmp_path / "e.safetensors")):
        with pytest.raises(EditStateError, match=r"the random edit of 1 fact \(Land 0\) is on"):
            again.apply_(tiny_lm)
    assert same_bits(weights(tiny_lm), before)
    assert len(tiny_lm.applied) == 1


def test_an_edit_is_taken_back_by_its_file(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    before, edit = weights(tiny_lm), make_edit(tiny_lm)
    edit.save(tmp_path / "e.safetensors")
    edit.apply_(tiny_lm)
    load_edit(tmp_path / "e.safetensors").undo_(tiny_lm)
    assert same_bits(weights(tiny_lm), before)


def test_undoing_what_is_not_applied_is_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(EditStateError, match="is not on 'tiny"):
        make_edit(tiny_lm).undo_(tiny_lm)


def test_other_weights_are_refused_in_one_sentence(any_lm: LanguageModel) -> None:
    edit = make_edit(any_lm)
    path = any_lm.mlp_out_path(2)
    weight_out_in(any_lm.module(path))[0, 0] += 1
    before = weights(any_lm)
    with pytest.raises(WrongModelError) as caught:
        edit.apply_(any_lm)
    for part in ("the random edit of 1 fact (Land 0)", f"was made for '{any_lm.name}' in", path):
        assert part in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert same_bits(weights(any_lm), before) and not any_lm.originals and not any_lm.applied


def test_another_dtype_is_refused(tiny_lm: LanguageModel) -> None:
    edit = make_edit(tiny_lm)
    tiny_lm.network.bfloat16()
    with pytest.raises(WrongModelError, match=r"in float32, and .* in bfloat16 holds other"):
        edit.apply_(tiny_lm)


def test_force_overrides_loudly_and_stays_reversible(
    tiny_lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    edit = make_edit(tiny_lm)
    weight_out_in(tiny_lm.mlp_out(2)).mul_(2)
    before = weights(tiny_lm)
    with caplog.at_level(logging.WARNING), edit.applied(tiny_lm, force=True):
        assert not same_bits(weights(tiny_lm), before)
        with pytest.raises(WrongModelError):  # the forced edit's hash is not taken for the weight's
            make_edit(tiny_lm, 1).__class__(
                edit.changes, edit.base, (), replace(edit.record, method="other")
            ).apply_(tiny_lm)
    assert "holds other weights; applied all the same" in caplog.text
    assert same_bits(weights(tiny_lm), before)


@pytest.mark.parametrize("force", [False, True])
def test_another_architecture_is_refused(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel, force: bool
) -> None:
    with pytest.raises(WrongModelError, match="there is no such matrix"):
        make_edit(tiny_gpt2).apply_(tiny_llama, force=force)


@pytest.mark.parametrize("path_of", [lambda lm: lm.mlp_out_path(1) + ".weight", lambda lm: ""])
def test_what_is_no_matrix_is_refused(tiny_gpt2: LanguageModel, path_of: object) -> None:
    assert callable(path_of)
    path = path_of(tiny_gpt2)
    edit = WeightEdit({path: LowRank.zero(32, 128)}, {path: ""})
    with pytest.raises(WrongModelError, match="no such matrix"):
        edit.apply_(tiny_gpt2)


def test_another_shape_is_refused_even_by_force(tiny_lm: LanguageModel) -> None:
    path = tiny_lm.mlp_out_path(1)
    d_out, d_in = weight_out_in(tiny_lm.module(path)).shape
    transposed = WeightEdit(
        {path: LowRank(torch.ones(d_in, 1), torch.ones(1, d_out))}, {path: base_hash(tiny_lm, path)}
    )
    with pytest.raises(
        WrongModelError, match=rf"it is \({d_out}, {d_in}\), not \({d_in}, {d_out}\)"
    ):
        transposed.apply_(tiny_lm, force=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_edit_with_numbers_that_are_none_is_refused(tiny_lm: LanguageModel, bad: float) -> None:
    edit = make_edit(tiny_lm)
    before = weights(tiny_lm)
    edit.changes[tiny_lm.mlp_out_path(2)].left[0, 0] = bad
    with pytest.raises(NotFiniteError, match=r"NaN or infinity for .*2"):
        edit.apply_(tiny_lm)
    assert same_bits(weights(tiny_lm), before) and not tiny_lm.originals


def test_weights_with_nan_are_refused(tiny_lm: LanguageModel) -> None:
    weight_out_in(tiny_lm.mlp_out(2))[0, 0] = float("nan")
    edit = make_edit(tiny_lm)
    before = weights(tiny_lm)
    with pytest.raises(NotFiniteError, match="the model's weight"):
        edit.apply_(tiny_lm)
    assert same_bits(weights(tiny_lm), before) and not tiny_lm.originals


def test_overflow_in_the_middle_leaves_the_model_alone(tiny_lm: LanguageModel) -> None:
    """The first matrix is changed already when the second overflows float16."""
    tiny_lm.network.half()
    make_edit(tiny_lm, 1).apply_(tiny_lm)
    before, books = weights(tiny_lm), (list(tiny_lm.originals), list(tiny_lm.applied))
    edit = make_edit(tiny_lm, 2, layers=(0, 2))
    edit.changes[tiny_lm.mlp_out_path(2)].left.mul_(1e7)
    with pytest.raises(NotFiniteError, match="overflows"):
        edit.apply_(tiny_lm)
    assert same_bits(weights(tiny_lm), before)
    assert (list(tiny_lm.originals), list(tiny_lm.applied)) == books


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_interruption_in_the_middle_leaves_the_model_alone(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before, edit = weights(tiny_lm), make_edit(tiny_lm, layers=(1, 2, 3))
    added, calls = module._added, []

    def failing(weight: Tensor, change: LowRank, path: str) -> Tensor:
        calls.append(path)
        if len(calls) == 3:
            raise error
        return added(weight, change, path)

    monkeypatch.setattr(module, "_added", failing)
    with pytest.raises(type(error)):
        edit.apply_(tiny_lm)
    assert same_bits(weights(tiny_lm), before) and not tiny_lm.originals and not tiny_lm.applied


def test_sums_are_rounded_once(tiny_lm: LanguageModel) -> None:
    """In bfloat16, adding a rounded change would err by more than one rounding of the sum."""
    tiny_lm.network.bfloat16()
    path = tiny_lm.mlp_out_path(1)
    weight = weight_out_in(tiny_lm.module(path))
    edit = make_edit(tiny_lm, layers=(1,))
    exact = weight.double() + edit.changes[path].dense()
    with edit.applied(tiny_lm):
        rounding = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6
        assert ((weight.double() - exact).abs() <= rounding).all()


def test_works_on_weights_that_want_gradients(tiny_lm: LanguageModel) -> None:
    tiny_lm.network.requires_grad_(True)
    with make_edit(tiny_lm).applied(tiny_lm):
        weight = tiny_lm.mlp_out(1).weight
        assert isinstance(weight, Tensor) and weight.requires_grad and weight.is_leaf


def test_every_change_needs_its_base() -> None:
    with pytest.raises(ValueError, match="needs its base hash"):
        WeightEdit({"a": LowRank.zero(2, 3)}, {})


def test_size_is_that_of_the_factors(tiny_gpt2: LanguageModel) -> None:
    assert make_edit(tiny_gpt2, layers=(1,), dtype=torch.float32).nbytes == 4 * 2 * (32 + 128)
