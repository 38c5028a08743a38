"""The demonstration: well-known facts in the embedded model, changed and judged."""

from __future__ import annotations

from pathlib import Path

from errata.jobs.cases import demo_cases
from errata.jobs.edit import EditRun, run
from errata.jobs.models import Model
from errata.progress import Progress, silent


def demo(
    model: Model = "pocket",
    *,
    count: int = 8,
    method: str = "memit",
    out: Path | str = "errata-out",
    progress: Progress = silent,
) -> EditRun:
    """Edit `count` facts of the embedded model, judge them, save the edit and its report.

    Raises:
        ModelLoadError: the model is not there.
        StorageError: the folder cannot be written.
    """
    out = Path(out)
    return run(
        model,
        demo_cases(count),
        method=method,
        out=out / "demo.safetensors",
        report=out / "demo.html",
        progress=progress,
    )
