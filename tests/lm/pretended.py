"""Pretended devices: "cpu:1", "cpu:2" ..., which compute on the CPU but refuse to be mixed.

A machine without accelerators can so test that tensors are brought together before they meet, as
several GPUs demand: operands on different devices raise here what they raise there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
_MAY_MIX = ("copy_", "_to_copy")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Pretended(Tensor):
    """A tensor that says it is on `device`; its numbers are on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> Pretended:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=device,
        )
        made.numbers = numbers
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.numbers, spec)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees also what makes tensors from nothing, on the device that it names."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` makes its tensor unseen by the others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    place = _place(func._schema.name.removeprefix("aten::"), args, tensors)
    if (wanted := kwargs.get("device")) is not None:
        place = torch.device(wanted)
        kwargs = kwargs | {"device": CPU}
    mine = {id(_inner(one)): one for one in tensors}
    done = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

    def outer(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        if id(one) in mine:  # changed in place
            return mine[id(one)]
        return one if place.index is None else Pretended(one, place)

    return tree_map(outer, done)


def _place(name: str, args: Any, tensors: list[Tensor]) -> torch.device:
    """Where an operation runs: where its operands are, all of them but CPU scalars and indices."""
    if name in _MAY_MIX:
        return tensors[0].device
    if name in _INDEXED:
        tensors = [one for one in tensors if one.device != CPU or one is args[0]]
    tensors = [one for one in tensors if one.device != CPU or (one.dim() and one.numel())]
    places = {one.device for one in tensors}
    if len(places) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device: {places}")
    return places.pop() if places else CPU


def _inner(one: Any) -> Any:
    return one.numbers if isinstance(one, Pretended) else one


@contextmanager
def pretended_devices() -> Iterator[None]:
    """While open, devices "cpu:1" and so on may be used."""
    with _Factories(), _Literals():  # type: ignore[no-untyped-call]
        yield


def spread_over_devices(network: nn.Module, places: dict[str, int]) -> None:
    """Move modules (by path) to pretended devices, with the hooks that a device map gives them."""
    for path, number in places.items():
        module, device = network.get_submodule(path), torch.device("cpu", number)
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                moved = nn.Parameter(Pretended(weight.detach(), device))
                setattr(part, name, moved)
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, Pretended(buffer, device))
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    add_hook_to_module(network, AlignDevicesHook(io_same_device=True))
