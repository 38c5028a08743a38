"""Methods that must learn first, in studies: one fit for all units that share it.

A unit's `fit` says what its editor learns from::

    [editor.fit]
    data = "pocket"       # any source of cases; by default that of the experiment
    count = 600           # of them at most, to learn from and to validate with; by default all
    clear_of = 200        # of the evaluated sample; by default all of it

The unit's seed draws the cases as it draws the evaluated ones, but those are left out that share a
prompt (of the rewrite or its paraphrases) or a fact (subject and relation) with one of the first
`clear_of` cases of the source that is evaluated. The evaluated sample is the first `count` of
these, so no editor has learnt from what it is judged on. A study that sweeps over `count` names
the largest as `clear_of`, and all its sizes share a fit.

A fit is kept in `FOLDER/fits` under the hash of all that it depends on (`keys.fit_key`), for every
study there: `KEY.safetensors`, and `KEY.json`, which tells how long it took, how much memory, and
how well it does on what was learnt from.
While it is made its checkpoints are in `KEY.fit`, from where it goes on if it was cut short, and
`KEY.lock` is held, so that another process that needs it waits for it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from errata.editors.fitted import load_editor
from errata.editors.trainable import Fitted, Trainable, TrainingCases
from errata.edits.edit import as_json
from errata.errors import DatasetError, StorageError
from errata.jobs.cases import sample_cases
from errata.jobs.files import make_folder, write_text
from errata.jobs.fit import judged
from errata.jobs.studies import host
from errata.jobs.studies.units import Unit
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import Case

JUDGED = 20
"""How many of the cases that were learnt from are asked after the fit: papers' column "train"."""


def training_cases(unit: Unit) -> TrainingCases:
    """What a unit's editor learns from, none of it evaluated.

    Raises:
        DatasetError: there are not so many cases beside the evaluated ones.
        FitError: there are not two.
    """
    assert unit.fit is not None
    data, count, clear_of = (unit.fit[name] for name in ("data", "count", "clear_of"))
    evaluated = sample_cases(unit.data, clear_of, unit.seed)
    prompts = {prompt for case in evaluated for prompt in _prompts(case)}
    facts = {case.fact for case in evaluated}
    others = [
        case
        for case in sample_cases(data, None, unit.seed)
        if case.fact not in facts and prompts.isdisjoint(_prompts(case))
    ]
    if len(others) < (count or 2):
        raise DatasetError(
            f"editor {unit.label!r} cannot learn from {count or 2} cases: {data} has {len(others)} "
            f"beside those about facts of the {len(evaluated)} evaluated ones. Lower the `count` "
            "of `fit`, or that of the evaluated cases."
        )
    return TrainingCases.split(others[:count], seed=unit.seed)


def fit_file(folder: Path | str, key: str) -> Path:
    """Where a fit is kept."""
    return Path(folder) / "fits" / f"{key[:24]}.safetensors"


def fitted(
    lm: LanguageModel, method: Trainable, unit: Unit, file: Path, progress: Progress = silent
) -> Fitted:
    """A unit's editor, from its file; where there is none it is fitted and kept.

    Args:
        lm: the model; it is left as it is.
        method: with the unit's numbers.
        unit: says what the editor learns from.
        file: of this fit alone.
        progress: called with (stage, done, total).

    Raises:
        FitError: the loss became NaN, or there is nothing to learn from.
        EditFileError: the file was altered.
        StorageError: the file, its lock or a checkpoint cannot be written.
    """
    if not file.exists():
        make_folder(file.parent)
        lock = FileLock(file.with_suffix(".lock"))
        try:
            lock.acquire()
        except OSError as error:
            raise StorageError(f"cannot lock {lock.lock_file}: {error.strerror}.") from error
        try:
            if not file.exists():
                _fit(lm, method, unit, file, progress)
        finally:
            lock.release()
    return load_editor(file, lm)


def told(lm: LanguageModel, editor: Fitted, file: Path) -> dict[str, Any]:
    """What a record tells of a fit: its file and notes, the weights it edits, time and memory."""
    weights = {path: weight_out_in(lm.module(path)).numel() for path in editor.fit.base}
    about = {
        "file": file.name,
        "parameters": sum(weights.values()),
        "weights": weights,
        "notes": editor.fit.notes,
    }
    aside = file.with_suffix(".json")
    return about | (json.loads(aside.read_text(encoding="utf-8")) if aside.exists() else {})


def _fit(lm: LanguageModel, method: Trainable, unit: Unit, file: Path, progress: Progress) -> None:
    checkpoints = file.with_suffix(".fit")
    resumed = checkpoints.exists()
    host.forget_peak_memory()
    start = time.perf_counter()
    cases = training_cases(unit)
    editor = method.fit(lm, cases, folder=checkpoints, progress=progress)
    took: dict[str, Any] = {"seconds": time.perf_counter() - start, "resumed": resumed}
    took |= host.about(str(lm.device))
    took["learnt"] = judged(lm, editor, cases.train[:JUDGED], progress=progress)
    # The editor's file comes last: where it is, the fit is whole.
    write_text(file.with_suffix(".json"), json.dumps(as_json(took), indent=2) + "\n")
    editor.save(file)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _prompts(case: Case) -> Sequence[str]:
    return [prompt.strip() for prompt in (case.request.text, *case.paraphrases)]
