"""What every command uses to speak: the terminal, progress bars, the closing hint."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PATIENCE = 1.0
"""Seconds that a stage may take before its bar appears."""
ALIKE = 3
"""So many messages of one kind are shown."""


def out() -> Console:
    """Where results go. Made anew, so that a redirected stdout is respected."""
    return Console(highlight=False, soft_wrap=False)


def errors() -> Console:
    """Where bars and the log go, so that results can be piped."""
    return Console(stderr=True, highlight=False)


def next_command(*commands: str) -> None:
    """Close with what to try now."""
    terminal = out()
    terminal.print()
    for place, command in enumerate(commands):
        lead = "Next: " if place == 0 else "      "
        # soft_wrap: a command must survive being copied
        terminal.print(Text.assemble((lead, "dim"), (command, "bold")), soft_wrap=True)


def quiet_libraries() -> None:
    """Silence the bars and hints of libraries; ours say what matters."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class FewAlike(logging.Filter):
    """Lets the first messages of each kind through: a stream may say the same of a thousand edits.

    Of one kind are those that one line of code logs.
    """

    def __init__(self) -> None:
        """Nothing has been said yet."""
        super().__init__()
        self._said: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is shown; the last one of its kind says so."""
        kind = record.pathname, record.lineno
        self._said[kind] += 1
        if self._said[kind] == ALIKE:
            record.msg += "\nFurther messages like this are not shown (-v shows them all)."
        return self._said[kind] <= ALIKE


class Bars:
    """Draws progress callbacks: one bar per stage, for stages that take a moment."""

    def __init__(self, bars: Progress) -> None:
        """Draw on `bars`."""
        self._bars = bars
        self._tasks: dict[str, tuple[TaskID, float]] = {}
        self.seconds: dict[str, float] = {}
        """How long each finished stage took."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the bar of `stage`."""
        clock = time.monotonic()
        if stage not in self._tasks:
            self._tasks[stage] = (self._bars.add_task(stage, total=total, visible=False), clock)
        task, start = self._tasks[stage]
        visible = clock - start >= PATIENCE and done < total
        self._bars.update(task, completed=done, total=total, visible=visible)
        if done >= total:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + clock - start
            self._bars.remove_task(task)
            del self._tasks[stage]


@contextmanager
def progress() -> Iterator[Bars]:
    """A progress callback that draws; nothing of it stays on the screen."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors(),
        transient=True,
    ) as bars:
        yield Bars(bars)
