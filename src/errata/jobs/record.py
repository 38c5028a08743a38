"""What a run did, as plain data: the JSON file from which the report is drawn."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from errata.edits.edit import as_json
from errata.jobs.files import write_text
from errata.measure.metrics import Estimate, reads
from errata.requests import UNLESS_DEFAULT

Kind = Literal["prompt", "paraphrase", "neighbour", "same subject"]

LIBRARIES = ("errata", "torch", "transformers", "tokenizers", "safetensors", "numpy")
"""Whose versions a record names."""


@dataclass(frozen=True)
class Said:
    """What the model writes after one prompt, before and after the edit."""

    kind: Kind
    prompt: str
    wanted: str
    """The new target; for neighbours and other facts of the subject, what must stay."""
    before: str
    after: str | None = None
    """None where nothing was edited."""
    unwanted: bool = field(default=False, metadata=UNLESS_DEFAULT)
    """Whether `wanted` is what should not come any more."""

    @property
    def right_before(self) -> bool:
        """Whether the unedited model said what is wanted."""
        return reads(self.before, self.wanted) != self.unwanted

    @property
    def right(self) -> bool:
        """Whether the model, as it is now, says what is wanted."""
        now = self.before if self.after is None else self.after
        return reads(now, self.wanted) != self.unwanted

    @property
    def verdict(self) -> str:
        """In one or two words, for a reader without colours."""
        if self.after is None:
            return "right" if self.right else "wrong"
        if self.kind in ("prompt", "paraphrase"):
            return "corrected" if self.right else "not corrected"
        if self.right_before:
            return "kept" if self.right else "moved"
        return "right now" if self.right else "wrong before"


@dataclass(frozen=True)
class Fact:
    """One request and everything that was asked about it."""

    subject: str
    prompt: str
    target: str
    true: str | None = None
    said: tuple[Said, ...] = ()


@dataclass(frozen=True)
class ScoreLine:
    """One score of each model that was judged, in the record's order."""

    name: str
    meaning: str
    estimates: tuple[Estimate | None, ...]
    """(mean, low, high, cases) each."""
    percent: bool = True
    """Whether it is a share, 0 to 1: told as 0 to 100, and drawn."""


@dataclass(frozen=True)
class Change:
    """How much one weight was changed."""

    path: str
    norm: float
    """Frobenius norm of the change."""
    rank: int
    weight_norm: float | None = None
    """Frobenius norm of the weight as it was."""

    @property
    def relative(self) -> float | None:
        """The change's share of the weight."""
        return self.norm / self.weight_norm if self.weight_norm else None


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report tells."""

    title: str
    model: str
    models: tuple[str, ...] = ("before", "after")
    """What each column of the scores judged."""
    method: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()
    fact_count: int = 0
    """How many facts the run was about; `facts` may show fewer."""
    scores: tuple[ScoreLine, ...] = ()
    changes: tuple[Change, ...] = ()
    edit_file: str = ""
    edit_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each stage took."""
    notes: tuple[str, ...] = ()
    seed: int | None = None
    created: str = field(default_factory=lambda: now())
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    def to_json(self) -> str:
        """As JSON, indented; what is not finite is null."""
        return json.dumps(as_json(self), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: Path | str) -> Path:
        """Write the JSON file.

        Raises:
            StorageError: the file cannot be written.
        """
        return write_text(path, self.to_json())


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions of everything that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
