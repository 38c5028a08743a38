"""Keeps transformers from writing to the user's terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging


@contextmanager
def no_weights_bar() -> Iterator[None]:
    """Keep transformers' bar "Loading weights" off the user's terminal, and nothing else."""
    # The first 5.x versions of transformers have no such hook; their bar is shown.
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == "Loading weights":
            kwargs = kwargs | {"disable": True}
        return before(factory, args, kwargs) if before else factory(*args, **kwargs)

    before = set_hook(hook)
    try:
        yield
    finally:
        set_hook(before)
