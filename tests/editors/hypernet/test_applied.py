"""A batch in which each row has a change of its own, against weights that are really changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors.hypernet.applied import low_rank_applied
from errata.editors.hypernet.gradients import Factors
from errata.errors import HookError
from errata.lm.load import LanguageModel
from errata.lm.loss import losses
from errata.lm.weights import weight_out_in
from tests.editors.hypernet.models import KINDS, mlps, some
from tests.lm.families import tiny_lm


def random_changes(
    lm: LanguageModel, paths: list[str], owners: int, rank: int = 3
) -> dict[str, Factors]:
    """Changes that move the loss, but not to where everything is flat."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for path in paths:
        d_out, d_in = weight_out_in(lm.module(path)).shape
        left = 0.1 * torch.randn(owners, d_out, rank, generator=generator)
        changes[path] = (left, torch.randn(owners, rank, d_in, generator=generator))
    return changes


def with_weights(lm: LanguageModel, changes: dict[str, Factors], owner: int, row: int) -> Tensor:
    """One example's loss with one owner's changes on the weights themselves."""
    weights = {path: weight_out_in(lm.module(path)) for path in changes}
    before = {path: weight.clone() for path, weight in weights.items()}
    for path, (left, right) in changes.items():
        weights[path] += left[owner] @ right[owner]
    try:
        return losses(lm, some(lm)[row : row + 1]).detach()[0]
    finally:
        for path, weight in before.items():
            weights[path].copy_(weight)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_own_owners_weights(kind: str) -> None:
    lm = tiny_lm(kind)
    paths = mlps(lm, 0, lm.layers - 1)
    changes, owner = random_changes(lm, paths, owners=3), torch.tensor([2, 0, 1, 0])
    unedited = losses(lm, some(lm)).detach()
    with low_rank_applied(lm, changes, owner):
        together = losses(lm, some(lm)).detach()
    alone = torch.stack([with_weights(lm, changes, int(o), row) for row, o in enumerate(owner)])
    assert_close(together, alone, rtol=1e-5, atol=1e-5)
    # Token ids of a word-piece tokenizer differ from process to process, and so does how far.
    assert not torch.isclose(together, unedited, rtol=1e-5, atol=1e-5).any()
    assert torch.equal(losses(lm, some(lm)).detach(), unedited)


def test_one_change_is_shared_by_all_rows() -> None:
    lm = tiny_lm("gpt2")
    changes = random_changes(lm, mlps(lm, 1), owners=1)
    with low_rank_applied(lm, changes, torch.zeros(4, dtype=torch.long)):
        together = losses(lm, some(lm)).detach()
    assert_close(together, torch.stack([with_weights(lm, changes, 0, row) for row in range(4)]))


def test_gradients_reach_the_factors() -> None:
    """... and are those of finite differences."""
    lm = tiny_lm("gpt2", dtype=torch.float64)
    paths = mlps(lm, 1)
    changes = {
        path: (left.double().requires_grad_(), right.double().requires_grad_())
        for path, (left, right) in random_changes(lm, paths, owners=2).items()
    }
    owner = torch.tensor([0, 1, 1, 0])

    def loss(*factors: Tensor) -> Tensor:
        pairs = dict(zip(paths, zip(factors[::2], factors[1::2], strict=True), strict=True))
        with low_rank_applied(lm, pairs, owner):
            return losses(lm, some(lm)).sum()

    factors = [factor for pair in changes.values() for factor in pair]
    assert torch.autograd.gradcheck(loss, factors, fast_mode=True)


def test_half_precision_models_stay_in_their_dtype() -> None:
    lm = tiny_lm("gpt2", dtype=torch.bfloat16)
    changes = random_changes(lm, mlps(lm, 1), owners=4)
    unedited = losses(lm, some(lm)).detach()
    with low_rank_applied(lm, changes, torch.arange(4)):
        assert (losses(lm, some(lm)).detach() - unedited).abs().max() > 1e-3


def test_a_module_that_does_not_run_is_told() -> None:
    lm = tiny_lm("gpt2")
    with (
        pytest.raises(HookError),
        low_rank_applied(lm, random_changes(lm, mlps(lm, 1), 1), torch.zeros(1, dtype=torch.long)),
    ):
        pass
