"""Gradients in parts: what goes into a matrix, and the loss's gradient of what comes out.

For a matrix W seen as (d_out, d_in) and one example, the gradient is a sum over tokens,

    dL / dW = sum_t delta_t x_t^T ,

with x_t (d_in) what goes in at token t and delta_t (d_out) the gradient of what comes out: as many
numbers as tokens times (d_in + d_out), never d_in times d_out. The rows of a whole batch of
examples come from one forward and one backward pass; which example each belongs to stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.errors import NotFiniteError
from errata.lm.forward import frozen
from errata.lm.hooks import captured, rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, example_batches, losses

Factors = tuple[Tensor, Tensor]
"""Changes of n owners to one matrix: left (n, d_out, r), right (n, r, d_in); zeros where one has
fewer than r rows."""

TYPICAL = 64
"""How many examples' gradients say what a typical one is."""


@dataclass(frozen=True)
class Decomposed:
    """A sum over rows delta_t x_t^T for one matrix, each row with its owner."""

    inputs: Tensor
    """(T, d_in) what goes into the matrix."""
    deltas: Tensor
    """(T, d_out) the gradient of what comes out."""
    owner: Tensor
    """(T,) which example (of a change: which edit) each row belongs to, ascending."""

    def of(self, owner: int) -> Decomposed:
        """One owner's rows."""
        mine = self.owner == owner
        return Decomposed(self.inputs[mine], self.deltas[mine], self.owner[mine])

    def low_rank(self) -> LowRank:
        """The sum over all rows; its rank is at most their number, and at most d_in and d_out."""
        left, right = self.deltas.mT, self.inputs
        if len(right) <= min(left.shape[0], right.shape[1]):
            return LowRank(left, right)
        return LowRank.exact(left @ right)  # more rows than that are one small matrix

    def stacked(self, owners: int) -> Factors:
        """Each owner's sum as factors of its own, with gradient."""
        counts = torch.bincount(self.owner, minlength=owners)
        begins = counts.cumsum(0) - counts
        place = torch.arange(len(self.owner), device=self.owner.device) - begins[self.owner]
        where = (self.owner, place)
        width = int(counts.max())
        left = self.deltas.new_zeros(owners, width, self.deltas.shape[1])
        right = self.inputs.new_zeros(owners, width, self.inputs.shape[1])
        return left.index_put(where, self.deltas).mT, right.index_put(where, self.inputs)

    def mean_square(self, owners: int) -> Tensor:
        """(n,) the mean squared entry of each owner's sum, never dense."""
        left, right = self.stacked(owners)
        squares = ((left.mT @ left) * (right @ right.mT)).sum(dim=(1, 2))
        return squares / (left.shape[1] * right.shape[2])


def decompose(
    lm: LanguageModel,
    examples: Sequence[Example],
    paths: Sequence[str],
    *,
    batch_tokens: int = 4096,
) -> dict[str, Decomposed]:
    """The gradient of every example's own loss with respect to some matrices, in rows.

    Tokens whose input or gradient is all zeros, padding among them, have no row. No weight holds a
    gradient at any time, and layers below the lowest matrix are run without one.

    Args:
        lm: the model, of any kind; it is left as it is.
        examples: prompts with the answers that are wanted; the owners.
        paths: module paths of the matrices.
        batch_tokens: at most so many tokens, padding included, in one pass: memory, not results.

    Raises:
        NotFiniteError: the loss or a gradient is NaN or infinite.
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
    """
    parts = [
        one_pass(lm, [examples[i] for i in sorted(group)], paths, torch.tensor(sorted(group)))
        for group in example_batches(lm, examples, batch_tokens)
    ]
    return {path: joined([part[path] for part in parts]) for path in paths}


def one_pass(
    lm: LanguageModel,
    examples: Sequence[Example],
    paths: Sequence[str],
    numbers: Tensor | None = None,
    *,
    differentiable: bool = False,
) -> dict[str, Decomposed]:
    """The same from a single pass, in which row i is example i.

    Args:
        lm: the model, as whatever contexts are open make it.
        examples: prompts with the answers that are wanted.
        paths: module paths of the matrices.
        numbers: (n,) the examples' numbers as owners, ascending; by default 0 to n - 1.
        differentiable: whether the gradients have gradients of their own.

    Raises:
        NotFiniteError: the loss or a gradient is NaN or infinite.
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
    """
    numbers = torch.arange(len(examples)) if numbers is None else numbers
    outputs: dict[str, Tensor] = {}

    def kept(path: str) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing below asks for a gradient: weights are frozen
                output.requires_grad_()
            outputs[path] = output
            return output

        return keep

    modules = {path: lm.module(path) for path in paths}
    with torch.enable_grad(), frozen(lm), captured(modules) as seen, ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(rewritten_output(module, kept(path)))
        loss = losses(lm, examples)
        if not loss.isfinite().all():
            lm.check_finite()
            worst = examples[int(loss.isfinite().int().argmin())]
            raise NotFiniteError(
                f"{lm.name} gives {worst.answer!r} after {worst.prompt!r} a loss that is not "
                "finite: its dtype overflows (try float32 or bfloat16)."
            )
        deltas = torch.autograd.grad(
            loss.sum(), [outputs[path] for path in paths], create_graph=differentiable
        )
    found = {}
    for path, delta in zip(paths, deltas, strict=True):
        inputs = seen.inputs[path]
        found[path] = _rows(lm, path, inputs if differentiable else inputs.detach(), delta, numbers)
    return found


def typical(
    lm: LanguageModel, examples: Sequence[Example], paths: Sequence[str]
) -> dict[str, float]:
    """The root mean square entry of each matrix' gradient, of the first `TYPICAL` examples."""
    some = examples[:TYPICAL]
    return {
        path: float(rows.mean_square(len(some)).mean().sqrt())
        for path, rows in decompose(lm, some, paths).items()
    }


def _rows(
    lm: LanguageModel, path: str, inputs: Tensor, deltas: Tensor, numbers: Tensor
) -> Decomposed:
    """The rows of (b, t, d_in) and (b, t, d_out) that are not all zeros, in float32 or wider."""
    if not deltas.isfinite().all():
        raise NotFiniteError(
            f"the gradient of {path} in {lm.name} is NaN or infinite; the dtype is too narrow for "
            "it: load the model in float32 or bfloat16."
        )
    real = (inputs != 0).any(-1) & (deltas != 0).any(-1)
    dtype = torch.promote_types(deltas.dtype, torch.float32)
    owner = numbers.to(real.device)[:, None].expand(real.shape)[real]
    return Decomposed(inputs[real].to(dtype), deltas[real].to(dtype), owner)


def joined(parts: Sequence[Decomposed]) -> Decomposed:
    """The rows of several sums, in their owners' order."""
    owner = torch.cat([part.owner for part in parts])
    order = owner.argsort(stable=True)
    return Decomposed(
        torch.cat([part.inputs for part in parts])[order],
        torch.cat([part.deltas for part in parts])[order],
        owner[order],
    )


def stacked(changes: Mapping[str, Decomposed], owners: int) -> dict[str, Factors]:
    """Each matrix' changes as factors for `low_rank_applied`."""
    return {path: change.stacked(owners) for path, change in changes.items()}
