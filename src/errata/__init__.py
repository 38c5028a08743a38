"""Correct facts in a language model, prove it, and keep the change as a small file.

::

    import errata

    lm = errata.LanguageModel.load("pocket")
    request = errata.Request("{} has its capital in", "France", target="Vienna", true="Paris")
    edit = errata.edit(lm, [request])
    with edit.applied(lm):
        print(errata.complete(lm, ["France has its capital in"], new_tokens=8))
    edit.save("france.safetensors")

Names are imported on first use, so that `import errata` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.editors import EDITORS
    from errata.edits.diff import diff
    from errata.edits.file import load_edit
    from errata.edits.stack import Stack
    from errata.errors import ErrataError
    from errata.jobs.edit import edit
    from errata.lm.generate import complete
    from errata.lm.load import LanguageModel
    from errata.measure.score import score
    from errata.requests import Case, Probe, Request, read_requests

__version__ = "0.1.0"

__all__ = [
    "EDITORS",
    "Case",
    "ErrataError",
    "LanguageModel",
    "Probe",
    "Request",
    "Stack",
    "complete",
    "diff",
    "edit",
    "load_edit",
    "read_requests",
    "score",
]

_HOMES = {
    "EDITORS": "errata.editors",
    "Case": "errata.requests",
    "ErrataError": "errata.errors",
    "LanguageModel": "errata.lm.load",
    "Probe": "errata.requests",
    "Request": "errata.requests",
    "Stack": "errata.edits.stack",
    "complete": "errata.lm.generate",
    "diff": "errata.edits.diff",
    "edit": "errata.jobs.edit",
    "load_edit": "errata.edits.file",
    "read_requests": "errata.requests",
    "score": "errata.measure.score",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'errata' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return sorted([*globals(), *__all__])
