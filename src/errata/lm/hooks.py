"""Contexts that look into a forward pass or change it, clean up after themselves, and speak up.

Each raises `HookError` when its layer never ran: a wrong layer would otherwise look like an
edit without effect. States are always (batch, tokens, width), even in families whose MLP sees
all tokens as one row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.errors import HookError

_FLAT_IN = "errata_flat_in"
_GATHERED = "errata_gathered"


class _Stop(BaseException):
    """Ends a forward pass early; never leaves this module."""


@dataclass
class Captured:
    """What passed through the watched modules in the last forward pass, by the caller's names."""

    inputs: dict[Any, Tensor] = field(default_factory=dict)
    outputs: dict[Any, Tensor] = field(default_factory=dict)


def mark_flat(module: nn.Module, block: nn.Module) -> None:
    """Note that `module` sees (b * t, d) where its `block` sees (b, t, d); hooks then undo it."""
    module.__dict__[_FLAT_IN] = block  # not setattr, which would make the block a child


def first(output: Any) -> Tensor:
    """The tensor of a module's output: blocks of some families return (hidden, cache, ...).

    Raises:
        HookError: there is none.
    """
    tensor = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(tensor, Tensor):
        raise HookError(f"expected a module that passes on a tensor, got {type(tensor).__name__}.")
    return tensor


@contextmanager
def captured(
    modules: Mapping[Any, nn.Module], what: Literal["input", "output", "both"] = "input"
) -> Iterator[Captured]:
    """While open, keep the (first) input and output of each module's last run.

    Raises:
        HookError: a module never ran.
    """
    kept = Captured()
    ran: set[Any] = set()

    def watch(name: Any) -> _Hook:
        def hook(args: tuple[Any, ...], output: Any, shape: torch.Size | None) -> None:
            ran.add(name)
            if what != "output":
                kept.inputs[name] = _shaped(first(args), shape)
            if what != "input":
                kept.outputs[name] = _shaped(first(output), shape)

        return hook

    with _hooks((module, watch(name)) for name, module in modules.items()):
        yield kept
    if missing := [name for name in modules if name not in ran]:
        raise HookError(f"no forward pass went through {missing} inside captured().")


@contextmanager
def rewritten_output(module: nn.Module, rewrite: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `module` returns `rewrite(output)`.

    Raises:
        HookError: the module never ran.
    """
    runs = 0

    def hook(_args: tuple[Any, ...], output: Any, shape: torch.Size | None) -> Any:
        nonlocal runs
        runs += 1
        new = rewrite(_shaped(first(output), shape))
        if shape is not None:
            new = new.flatten(0, 1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with _hooks([(module, hook)]):
        yield
    if not runs:
        raise HookError(f"{type(module).__name__} did not run inside rewritten_output().")


@contextmanager
def rewritten_input(module: nn.Module, rewrite: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `module` works on `rewrite(input)`.

    Raises:
        HookError: the module never ran.
    """
    runs = 0
    handles: list[RemovableHandle] = []
    shapes = _true_shapes(module, handles)

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal runs
        runs += 1
        states = first(args)
        new = rewrite(_shaped(states, shapes[-1] if shapes else None))
        return (new.reshape(states.shape), *args[1:])

    handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not runs:
        raise HookError(f"{type(module).__name__} did not run inside rewritten_input().")


@contextmanager
def stopped_after(module: nn.Module) -> Iterator[None]:
    """Run a forward pass only as far as `module`; what comes after it is not computed.

    The pass must be the last statement inside, since it ends the block.

    Raises:
        HookError: the module never ran.
    """
    stop = _Stop()

    def hook(*_: Any) -> None:
        raise stop

    try:
        with _hooks([(module, hook)]):
            yield
    except _Stop as caught:
        if caught is not stop:  # a context around this one ended the pass before `module`
            raise
    else:
        raise HookError(f"{type(module).__name__} did not run inside stopped_after().")


@contextmanager
def gathered_input(module: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """While open, `module` sees only the states at (rows, columns): (b, t, d) becomes (m, d).

    On the head, this computes logits only where they are scored, in any family, and what the
    family does to logits afterwards still happens.

    Raises:
        HookError: the module never ran.
    """
    runs = 0

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal runs
        runs += 1
        states = first(args)
        return (states[rows.to(states.device), columns.to(states.device)], *args[1:])

    handle = module.register_forward_pre_hook(hook)
    outer = module.__dict__.get(_GATHERED)
    module.__dict__[_GATHERED] = rows, columns
    try:
        yield
    finally:
        module.__dict__[_GATHERED] = outer
        handle.remove()
    if not runs:
        raise HookError(f"{type(module).__name__} did not run inside gathered_input().")


def gathered_at(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The (rows, columns) that `gathered_input` now shows to `module`; None while it sees all."""
    places: tuple[Tensor, Tensor] | None = module.__dict__.get(_GATHERED)
    return places


@contextmanager
def replaced_forward(modules: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While open, each module's forward is the given function (called without the module)."""
    missing = object()
    before = {module: module.__dict__.get("forward", missing) for module in modules}
    for module, forward in modules.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def computed_at(module: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """While open, `module` computes only the tokens at (rows, columns) and returns 0 for others.

    For a module that takes tokens one by one, where what it says of the others is not needed.
    """
    compute = module.forward

    def forward(states: Tensor) -> Tensor:
        at = rows.to(states.device), columns.to(states.device)
        part: Tensor = compute(states[at][:, None])[:, 0]
        return part.new_zeros(*states.shape[:2], part.shape[1]).index_put(at, part)

    with replaced_forward({module: forward}):
        yield


def attach(module: nn.Module, rewrite: Callable[[Tensor, Tensor], Tensor]) -> list[RemovableHandle]:
    """From now on `module` returns `rewrite(input, output)`, until all of the handles are removed.

    For what stays on a model; a change for the length of a block is `rewritten_output`.
    """

    def hook(args: tuple[Any, ...], output: Any, shape: torch.Size | None) -> Any:
        said = first(output)
        new = rewrite(_shaped(first(args), shape), _shaped(said, shape)).reshape(said.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles: list[RemovableHandle] = []
    _attach(module, hook, handles)
    return handles


@contextmanager
def attached(module: nn.Module, rewrite: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While open, `module` returns `rewrite(input, output)`, whether or not it is run."""
    handles = attach(module, rewrite)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_Hook = Callable[[tuple[Any, ...], Any, torch.Size | None], Any]
"""Called with a module's inputs, its output and, if it sees tokens flat, their true (b, t)."""


@contextmanager
def _hooks(hooks: Iterable[tuple[nn.Module, _Hook]]) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for module, hook in hooks:
            _attach(module, hook, handles)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(module: nn.Module, hook: _Hook, handles: list[RemovableHandle]) -> None:
    shapes = _true_shapes(module, handles)
    handles.append(
        module.register_forward_hook(
            lambda _module, args, kwargs, output: hook(
                _inputs(args, kwargs), output, shapes[-1] if shapes else None
            ),
            with_kwargs=True,
        )
    )


def _true_shapes(module: nn.Module, handles: list[RemovableHandle]) -> deque[torch.Size]:
    """Where the (b, t) of the last run stands if `module` sees tokens flat; else it is empty."""
    shapes: deque[torch.Size] = deque(maxlen=1)
    block = module.__dict__.get(_FLAT_IN)
    if block is not None:
        handles.append(
            block.register_forward_pre_hook(
                lambda _block, args, kwargs: shapes.append(_inputs(args, kwargs)[0].shape[:2]),
                with_kwargs=True,
            )
        )
    return shapes


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a module was called with; attention modules get their states by name, first."""
    return (*args, *kwargs.values())


def _shaped(states: Tensor, shape: torch.Size | None) -> Tensor:
    return states if shape is None else states.reshape(*shape, -1)
