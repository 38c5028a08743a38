"""Growing a small model that knows the facts of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.grow import grow as grow_model
from errata.pocket.lessons import LESSONS
from errata.pocket.shapes import recipe
from errata.pocket.training import Report
from errata.progress import Progress, silent


@dataclass(frozen=True)
class Grown:
    """What was grown."""

    folder: Path
    facts: int
    subjects: int


def grow(
    facts: Path | str | None,
    out: Path | str,
    *,
    model: str = "pocket",
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Progress = silent,
) -> Grown:
    """Grow a model that knows the facts of a file.

    Args:
        facts: JSON lines of facts, or a CounterFact file; errata's own facts by default.
        out: folder for the model.
        model: `pocket` (GPT-2's shape), `pocket-llama` (Llama's), `pocket-bert` or `pocket-t5`.
        steps: how long to train; by default what the shipped recipe takes.
        minutes: instead, about how long it may take on this machine.
        seed: of the weights and of everything that is read.
        resume: continue a run that was stopped.
        progress: called with (stage, done, total).

    Raises:
        FactFileError: the file holds no facts, or a line is not one.
        GrowError: the run failed, or the folder holds another run's checkpoint.
    """
    encyclopedia = Encyclopedia.read(facts) if facts else Encyclopedia.load()
    config = recipe(model, seed=seed, minutes=minutes, steps=steps)

    def watch(report: Report) -> None:
        progress(report.stage, report.step, report.steps)

    folder = grow_model(
        config,
        encyclopedia,
        out,
        progress=watch,
        resume=resume,
        facts_from=str(facts or ""),
    )
    facts_read = LESSONS[model](encyclopedia, config).facts
    return Grown(folder, len(facts_read), len({fact.subject for fact in facts_read}))
