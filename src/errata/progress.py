"""How long work tells how far it is: a callback that jobs hand down and interfaces draw."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); `done == total` ends the stage. Never prints by itself."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress nobody watches."""
