from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata.errors import HookError
from errata.lm.hooks import (
    captured,
    computed_at,
    gathered_input,
    replaced_forward,
    rewritten_input,
    rewritten_output,
    stopped_after,
)
from errata.lm.load import LanguageModel
from tests.lm.families import tiny_lm

FAMILIES = ("gpt2", "opt", "llama")
IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@contextmanager
def left_clean(lm: LanguageModel) -> Iterator[None]:
    """Whatever happens inside, no module keeps a hook or a forward of its own."""
    before = lm.network(input_ids=IDS).logits
    yield
    for module in lm.network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert torch.equal(lm.network(input_ids=IDS).logits, before)


def contexts(lm: LanguageModel) -> list[Callable[[], AbstractContextManager[Any]]]:
    middle, index = lm.mlp_out(1), torch.tensor([0])
    return [
        lambda: captured({"x": middle, "y": lm.block(1)}, "both"),
        lambda: rewritten_output(lm.mlp(1), torch.zeros_like),
        lambda: rewritten_input(middle, torch.zeros_like),
        lambda: stopped_after(middle),
        lambda: gathered_input(lm.head, index, index),
        lambda: replaced_forward({lm.final_norm: lambda states: states}),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_clean_up_after_use_and_after_exceptions(family: str) -> None:
    lm = tiny_lm(family)
    with left_clean(lm):
        for make in contexts(lm):
            with make():
                lm.network(input_ids=IDS)
            with pytest.raises(KeyError, match="own"), make():
                raise KeyError("own")
            with pytest.raises(IndexError), make():  # a token that does not exist
                lm.network(input_ids=torch.tensor([[10_000]]))


def test_a_layer_that_never_ran_is_told() -> None:
    lm = tiny_lm()
    with left_clean(lm):
        for make in contexts(lm)[:5]:
            with pytest.raises(HookError, match=r"inside|never|did not run"), make():
                pass
        with pytest.raises(HookError, match=r"\['late'\]"):
            names = {"early": lm.block(0), "late": lm.block(3)}
            with captured(names), stopped_after(lm.block(1)):
                lm.network(input_ids=IDS)


def test_a_bad_hook_point_leaks_nothing() -> None:
    lm = tiny_lm()
    with (
        left_clean(lm),
        pytest.raises(AttributeError),
        captured({"good": lm.block(0), "bad": None}),  # type: ignore[dict-item]
    ):
        pass


def test_one_module_under_two_names() -> None:
    lm = tiny_lm("opt")  # where the MLP and its last matrix are one module
    with captured({"mlp": lm.mlp(0), "out": lm.mlp_out(0)}, "output") as seen:
        lm.network(input_ids=IDS)
    assert torch.equal(seen.outputs["mlp"], seen.outputs["out"])


def test_nested_stops_end_at_the_earlier_module() -> None:
    lm = tiny_lm()
    with (
        left_clean(lm),
        pytest.raises(HookError, match="did not run inside stopped_after"),
        stopped_after(lm.block(2)),
        stopped_after(lm.block(0)),
    ):
        lm.network(input_ids=IDS)


def test_an_inner_stop_lets_an_outer_one_pass() -> None:
    lm = tiny_lm()
    ran: list[str] = []
    with left_clean(lm), stopped_after(lm.block(0)):
        with stopped_after(lm.block(2)):
            lm.network(input_ids=IDS)
        ran.append("after the inner context")
    assert not ran  # the outer stop ended the outer block, not the inner


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_works_on_its_rewritten_input(family: str) -> None:
    lm = tiny_lm(family)
    shapes: list[torch.Size] = []

    def double(states: Tensor) -> Tensor:
        shapes.append(states.shape)
        return 2 * states

    with (
        left_clean(lm),
        rewritten_input(lm.mlp_out(1), double),
        captured({0: lm.mlp_out(1)}, "both") as seen,
    ):
        lm.network(input_ids=IDS)
    with captured({0: lm.mlp_out(1)}, "both") as plain:
        lm.network(input_ids=IDS)
    torch.testing.assert_close(seen.inputs[0], 2 * plain.inputs[0])
    torch.testing.assert_close(seen.outputs[0], lm.mlp_out(1)(2 * plain.inputs[0]))
    assert [shape[:2] for shape in shapes] == [IDS.shape]  # tokens never flat


@pytest.mark.parametrize("family", FAMILIES)
def test_rewrites_compose_in_the_order_they_were_opened(family: str) -> None:
    lm = tiny_lm(family)
    with (
        left_clean(lm),
        rewritten_output(lm.mlp(1), lambda output: output + 1),
        rewritten_output(lm.mlp(1), lambda output: output * 2),
        captured({0: lm.mlp(1)}, "output") as seen,
    ):
        lm.network(input_ids=IDS)
    with captured({0: lm.mlp(1)}, "output") as plain:
        lm.network(input_ids=IDS)
    torch.testing.assert_close(seen.outputs[0], (plain.outputs[0] + 1) * 2)


def test_computed_at_leaves_out_the_other_tokens() -> None:
    lm = tiny_lm("llama")
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0])
    with captured({0: lm.mlp(1)}, "output") as plain:
        lm.network(input_ids=IDS)
    with (
        left_clean(lm),
        computed_at(lm.mlp(1), rows, columns),
        captured({"mlp": lm.mlp(1), "inside": lm.mlp_out(1)}, "both") as seen,
    ):
        lm.network(input_ids=IDS)
    assert seen.inputs["inside"].shape[:2] == (3, 1)  # no more than was asked for
    found = seen.outputs["mlp"]
    torch.testing.assert_close(found[rows, columns], plain.outputs[0][rows, columns])
    found[rows, columns] = 0
    assert found.shape[:2] == IDS.shape and not found.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_a_rewrite(family: str) -> None:
    lm = tiny_lm(family)
    vector = torch.zeros(lm.d_model, requires_grad=True)

    def add(output: Tensor) -> Tensor:
        return torch.cat([output[:, :1] + vector, output[:, 1:]], dim=1)

    with rewritten_output(lm.mlp(0), add):
        loss = lm.network(input_ids=IDS).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, vector)
    assert gradient.isfinite().all() and gradient.any()


def test_outputs_without_a_tensor_are_told() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x]

    odd = Odd()
    with pytest.raises(HookError, match="list"), captured({0: odd}, "output"):
        odd(torch.zeros(1))


def test_replaced_forward_restores_an_own_forward() -> None:
    layer = nn.Identity()
    layer.forward = lambda x: x + 1  # type: ignore[assignment, method-assign]
    with replaced_forward({layer: lambda x: x + 2}):
        assert layer(torch.tensor(0)) == 2
    assert layer(torch.tensor(0)) == 1
