"""Many edited models in one pass: each row of a batch runs with a change of its own.

A matrix with a low-rank change gives W x + left (right x). Only the second term differs from row to
row, so the network runs once on the whole batch, and the thin products are added to what its
matrices put out: no copy of the model, no weight is touched, and gradients reach the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from errata.editors.hypernet.gradients import Factors
from errata.lm.hooks import Captured, captured, rewritten_output
from errata.lm.load import LanguageModel


@contextmanager
def low_rank_applied(
    lm: LanguageModel, changes: Mapping[str, Factors], owner: Tensor
) -> Iterator[None]:
    """While open, row i of every batch runs with the changes of `owner[i]`.

    Args:
        lm: the model.
        changes: by module path, left (n, d_out, r) and right (n, r, d_in) of n owners.
        owner: (rows,) numbers from 0 to n - 1; each batch must have so many rows.

    Raises:
        HookError: a changed module never ran.
    """

    def changed(path: str, seen: Captured) -> Callable[[Tensor], Tensor]:
        left, right = changes[path]
        mine = owner.to(left.device)
        left, right = left[mine], right[mine]

        def add(output: Tensor) -> Tensor:
            x = seen.inputs.pop(path).to(right)
            assert len(x) == len(mine), f"{len(x)} rows of a batch, owners of {len(mine)}"
            return output + (x @ right.mT @ left.mT).to(output)

        return add

    modules = {path: lm.module(path) for path in changes}
    with captured(modules) as seen, ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(rewritten_output(module, changed(path, seen)))
        yield
