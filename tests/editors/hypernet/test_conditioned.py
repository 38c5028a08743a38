"""KE's network: its change is the paper's dense formula, in as many rows as tokens and one more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.editors.hypernet.conditioned import Conditioned, ConditionedConfig, Masks
from errata.editors.hypernet.gradients import Decomposed
from errata.errors import ConfigError

SHAPES = {"a": (5, 7), "b": (7, 5)}
LENGTHS = [4, 2, 6]
OWNER = torch.tensor([0, 0, 0, 1, 2, 2])


def network(**config: object) -> Conditioned:
    settings = {"hidden": 3, "condition": 6, "inner": 4, "initial": "random"} | config
    made = Conditioned(8, SHAPES, ConditionedConfig.from_dict(settings), seed=1)
    made.measure_in_([(0.7, 0.3), (1.5, 0.2)])
    return made.eval()


def words() -> Tensor:
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(2))


def gradients() -> dict[str, Decomposed]:
    draw = torch.Generator().manual_seed(3)
    return {
        path: Decomposed(
            torch.randn(len(OWNER), d_in, generator=draw),
            torch.randn(len(OWNER), d_out, generator=draw),
            OWNER,
        )
        for path, (d_out, d_in) in SHAPES.items()
    }


def dense(masks: Masks, edit: int, gradient: Tensor, mask: float, offset: float) -> Tensor:
    """De Cao et al., section 4.2, entry by entry."""
    weigh = torch.outer(masks.rows[edit], masks.columns[edit])
    add = torch.outer(masks.offset_rows[edit], masks.offset_columns[edit])
    return masks.gate[edit] * (mask * weigh * gradient + offset * add)


def test_the_change_is_the_dense_formula() -> None:
    made, given = network(), gradients()
    found, masks = made.changes(given, words(), LENGTHS), made(words(), LENGTHS)
    for number, path in enumerate(SHAPES):
        mask, offset = made.units[number].tolist()
        for edit in range(3):
            gradient = given[path].of(edit).low_rank().dense()
            wanted = dense(masks[path], edit, gradient, mask, offset)
            assert_close(found[path].of(edit).low_rank().dense(), wanted)
            assert len(found[path].of(edit).owner) == OWNER.tolist().count(edit) + 1


def test_rows_of_a_mask_sum_to_one_and_gates_are_open_in_part() -> None:
    for masks in network()(words(), LENGTHS).values():
        for rows in (masks.rows, masks.offset_rows):
            assert_close(rows.sum(dim=1), torch.ones(3))
        assert ((masks.gate > 0) & (masks.gate < 1)).all()


def test_what_stands_beside_a_text_does_not_matter() -> None:
    """Padded in a batch, whatever the padding, and alone: the same."""
    together = network()(words(), LENGTHS)
    noise = words()
    noise[1, 2:] = 9.0
    for other, edit in ((network()(noise, LENGTHS), 1), (network()(words()[1:2, :2], [2]), 0)):
        for path, masks in other.items():
            assert_close(masks.columns[edit], together[path].columns[1])
            assert_close(masks.gate[edit], together[path].gate[1])


def test_it_begins_as_a_step_down_the_gradient_whatever_it_reads() -> None:
    made, given = network(initial="descent"), gradients()
    found = made.changes(given, words(), LENGTHS)
    for number, (path, (d_out, _)) in enumerate(SHAPES.items()):
        step = 0.5 * float(made.units[number, 0]) / d_out
        assert_close(found[path].low_rank().dense(), -step * given[path].low_rank().dense())


def test_from_there_all_of_it_learns() -> None:
    """Two steps of descent on the network, and every parameter has moved."""
    made, given = network(initial="descent").train(), gradients()
    before = {name: value.clone() for name, value in made.named_parameters()}
    adam = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        changes = made.changes(given, words(), LENGTHS)
        torch.autograd.backward(
            [(changes[path].low_rank().dense() - 1).square().sum() for path in SHAPES]
        )
        adam.step()
    assert all(not torch.equal(before[name], value) for name, value in made.named_parameters())


def test_the_seed_draws_it_and_nothing_else() -> None:
    state = torch.random.get_rng_state()
    first, second = network().state_dict(), network().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"hidden": 0}, "hidden must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"units": "miles"}, "units is one of relative, absolute"),
        ({"initial": "ascent"}, "initial is one of descent, random"),
    ],
)
def test_numbers_without_sense_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ConditionedConfig.from_dict(settings)
