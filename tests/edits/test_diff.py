"""Differences: facts by name, numbers against the dense matrices."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import subspace_angles

from errata.algebra.low_rank import LowRank
from errata.edits.diff import LAYER_HEADINGS, diff
from errata.edits.stack import Stack
from errata.edits.weights import WeightEdit
from errata.errors import WrongModelError
from errata.lm.load import LanguageModel
from errata.requests import Request
from tests.edits.making import make_edit


def edit_of(*requests: Request, left: torch.Tensor, right: torch.Tensor) -> WeightEdit:
    return WeightEdit({"w": LowRank(left, right)}, {"w": ""}, requests)


def test_facts_are_sorted_out(tiny_lm: LanguageModel) -> None:
    a = Stack(
        [make_edit(tiny_lm, k, subject=s) for k, s in enumerate(("France", "Italy", "Spain"))]
    )
    b = Stack(
        [
            make_edit(tiny_lm, 3, subject="Italy", target=" Rome"),  # a space does not matter
            make_edit(tiny_lm, 4, subject="Spain", target="Cairo"),
            make_edit(tiny_lm, 5, subject="Peru"),
        ]
    )
    found = diff(a, b)
    assert [fact.subject for fact in found.only_a] == ["France"]
    assert [fact.subject for fact in found.only_b] == ["Peru"]
    assert [fact.subject for fact in found.shared] == ["Italy"]
    assert [(x.target, y.target) for x, y in found.contradictions] == [("Rome", "Cairo")]
    assert found.fact_rows() == [
        ("a against b", "The capital of Spain is", "Rome | Cairo"),
        ("only a", "The capital of France is", "Rome"),
        ("only b", "The capital of Peru is", "Rome"),
    ]


def test_the_last_word_of_a_stack_counts(tiny_lm: LanguageModel) -> None:
    early, late = (make_edit(tiny_lm, 0, subject="Peru", target=t) for t in ("Rome", "Cairo"))
    assert not diff(Stack([early, late]), late).contradictions


def test_numbers_equal_the_dense_ones(tiny_lm: LanguageModel) -> None:
    a, b = make_edit(tiny_lm, 0, layers=(1, 2)), make_edit(tiny_lm, 1, layers=(2, 3))
    found = {layer.path: layer for layer in diff(a, b).layers}
    assert list(found) == [tiny_lm.mlp_out_path(layer) for layer in (1, 2, 3)]
    both = found[tiny_lm.mlp_out_path(2)]
    x, y = (edit.changes[both.path].dense() for edit in (a, b))
    assert both.norm_a == pytest.approx(float(x.norm()))
    assert both.norm_b == pytest.approx(float(y.norm()))
    assert both.norm_difference == pytest.approx(float((x - y).norm()))
    assert both.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()))
    angles = subspace_angles(*(edit.changes[both.path].right.mT.numpy() for edit in (a, b)))
    assert both.overlap == pytest.approx(float((torch.from_numpy(angles).cos() ** 2).mean()))
    alone = found[tiny_lm.mlp_out_path(1)]
    assert (alone.norm_b, alone.cosine, alone.overlap) == (0, 0, 0)
    assert alone.norm_difference == pytest.approx(alone.norm_a)


def test_an_edit_against_itself(tiny_lm: LanguageModel) -> None:
    edit = make_edit(tiny_lm)
    found = diff(edit, edit)
    assert not found.fact_rows() and found.shared == edit.requests
    for layer in found.layers:
        assert layer.cosine == pytest.approx(1) and layer.overlap == pytest.approx(1)
        assert layer.norm_difference < 1e-6 * layer.norm_a
    assert all(len(row) == len(LAYER_HEADINGS) for row in found.layer_rows())


def test_overlap_is_of_spaces_not_of_rows() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    left = torch.ones(3, 2, dtype=torch.float64)
    a = edit_of(left=left, right=axes[:2])
    turned = edit_of(left=left, right=torch.tensor([[1.0, 1], [1, -1]]).double() @ axes[:2])
    assert diff(a, turned).layers[0].overlap == pytest.approx(1)
    assert diff(a, edit_of(left=left, right=axes[1:3])).layers[0].overlap == pytest.approx(0.5)
    assert diff(a, edit_of(left=left, right=axes[3:5])).layers[0].overlap == pytest.approx(0)
    twice = edit_of(left=left, right=axes[[0, 0]])  # one dimension, said twice
    assert diff(a, twice).layers[0].overlap == pytest.approx(1)
    nothing = edit_of(left=left, right=0 * axes[:2])
    assert diff(a, nothing).layers[0].overlap == 0


def test_edits_for_different_models_are_refused() -> None:
    a = edit_of(left=torch.ones(3, 1), right=torch.ones(1, 6))
    with pytest.raises(WrongModelError, match=r"w is \(3, 6\) in one and \(3, 5\)"):
        diff(a, edit_of(left=torch.ones(3, 1), right=torch.ones(1, 5)))
