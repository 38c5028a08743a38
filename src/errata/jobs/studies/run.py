"""Running an experiment: what is not finished yet is computed, wherever, and kept for good.

Results are in `FOLDER/NAME.sqlite`, one row for each unit under a key of all that it depends on
(`keys`). Whoever is interrupted runs it again: what is there is skipped, what another study has
computed is taken over, streams go on in the middle. A unit that fails is told with its reason, and
tried again next time; the others go on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from errata.errors import ConfigError, ErrataError, ModelLoadError
from errata.jobs.cases import sample_cases
from errata.jobs.cluster import Done, Where, map_
from errata.jobs.studies.declared import declared
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.fields import meant
from errata.jobs.studies.fits import fit_file, training_cases
from errata.jobs.studies.keys import cases_hash, code_hash, fit_key, model_hash, text_hash, unit_key
from errata.jobs.studies.protocols import Outcome, perform
from errata.jobs.studies.rows import Row
from errata.jobs.studies.store import Store
from errata.jobs.studies.units import UNEDITED, Unit, chosen_by
from errata.lm.load import POCKET
from errata.progress import Progress, silent

FOLDER = Path("results")
"""Where results are kept unless told otherwise."""

Job = tuple[Mapping[str, Any], str, str]
"""What travels to a worker: a unit as plain values, the folder for its checkpoints, and the file of
its fitted editor; empty if it needs none."""


@dataclass(frozen=True)
class Summary:
    """What became of the units of a run."""

    path: Path
    """The database."""
    done: int = 0
    skipped: int = 0
    """They were there already."""
    adopted: int = 0
    """Another study had computed them."""
    elsewhere: int = 0
    """Another process was at them."""
    failed: tuple[tuple[str, str], ...] = ()
    """(unit, why) of each that failed."""
    seconds: float = 0.0


def store_path(experiment: Experiment, folder: Path | str = FOLDER) -> Path:
    """Where the results of an experiment are."""
    return Path(folder) / f"{experiment.name}.sqlite"


def chosen(experiment: Experiment, only: str | None = None) -> list[Unit]:
    """The units whose description has the text in it; all without one.

    Raises:
        ConfigError: there is none.
    """
    units = experiment.units()
    if only is None:
        return units
    found = [unit for unit in units if only.lower() in str(unit).lower()]
    if not found:
        told = "\n".join(f"  {unit}" for unit in units[:10])
        raise ConfigError(f"no unit has {only!r} in its description; the first are:\n{told}")
    return found


@dataclass(frozen=True)
class Piece:
    """A unit with the hashes of all that it works on."""

    unit: Unit
    hashes: Mapping[str, str]


def keyed(units: Sequence[Unit], progress: Progress = silent) -> dict[str, Piece]:
    """Units by their keys: reads models' files and draws all samples of cases.

    Raises:
        ModelLoadError: a model is not there.
        DatasetError: a source has too few cases.
        ConfigError: two units are the same work under different names.
    """
    known: dict[Any, str] = {}

    def once(compute: Callable[[], str], *asked: Any) -> str:
        if asked not in known:
            known[asked] = compute()
        return known[asked]

    found: dict[str, Piece] = {}
    for number, unit in enumerate(units):
        progress("reading models and data", number, len(units))
        sample = unit.data, unit.count, unit.seed
        text = unit.corpus, unit.corpus_tokens, unit.method == UNEDITED
        hashes = {
            "model": once(partial(_model_hash, unit), "model", unit.model),
            "cases": once(partial(_sample_hash, *sample), "cases", *sample),
            "text": once(partial(text_hash, unit), "text", unit.model, *text),
            "code": code_hash(unit.method, located=bool(chosen_by(unit))),
        }
        if unit.fit is not None:
            hashes["fit"] = fit_key(unit, model=hashes["model"], cases=training_cases(unit))
        key = unit_key(unit, **hashes)
        if key in found:
            raise ConfigError(
                "these are the same work under two names; keep one of them:\n"
                f"  {found[key].unit}\n  {unit}"
            )
        found[key] = Piece(unit, hashes)
    progress("reading models and data", len(units), len(units))
    return found


def _sample_hash(data: str, count: int | None, seed: int) -> str:
    return cases_hash(sample_cases(data, count, seed))


def _model_hash(unit: Unit) -> str:
    try:
        return model_hash(unit.model, dtype=unit.dtype, device=unit.device)
    except ModelLoadError as error:
        raise ModelLoadError(f"{error}{meant(unit.model, POCKET)}") from error


def run(
    experiment: Experiment,
    *,
    folder: Path | str = FOLDER,
    on: Where = "loop",
    workers: int | None = None,
    address: str | None = None,
    only: str | None = None,
    progress: Progress = silent,
) -> Summary:
    """Compute what is not finished yet.

    Several processes may run the same experiment: in a loop each takes unit after unit that no
    other has; with workers, all that are left at once.

    Args:
        experiment: what to do.
        folder: where results and checkpoints are kept.
        on: where work is done; see `errata.jobs.cluster.map_`.
        workers: how many at once.
        address: of a Ray cluster.
        only: only units whose description has this text in it.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: no unit has that text, two units are the same work, what the file shows of
            results does not fit, or a setting of the work is impossible.
        ModelLoadError: a model is not there.
        StorageError: results cannot be written.
        ClusterError: no worker starts.
    """
    start = time.perf_counter()
    # So that a typo in a table, or a place where no work can be done, is found before the work.
    declared(experiment)
    map_(work, (), on=on, workers=workers, address=address)
    pieces = keyed(chosen(experiment, only), progress)
    path = store_path(experiment, folder)
    counts = {"done": 0, "elsewhere": 0}
    failed: list[tuple[str, str]] = []
    with Store(path) as store:
        adopted = store.adopt(pieces, experiment.name)
        done = {key for key, status in store.statuses().items() if status == "done"}
        there = done & pieces.keys()
        for key in there:
            store.rename(key, experiment.name, pieces[key].unit.to_dict())
        todo = [key for key in pieces if key not in there]
        size = 1 if on == "loop" else max(1, len(todo))
        for at in range(0, len(todo), size):
            progress("units", at, len(todo))
            keys = [key for key in todo[at : at + size] if store.claim(key)]
            counts["elsewhere"] += len(todo[at : at + size]) - len(keys)
            jobs = [_job(key, pieces[key], path) for key in keys]
            if on == "loop":
                finished = _here(jobs, progress)
            else:
                finished = map_(work, jobs, on=on, workers=workers, address=address)
            for count, result in enumerate(finished, 1):
                key = keys[result.index]
                store.put(_row(key, experiment.name, pieces[key], result))
                counts["done"] += result.error is None
                if result.error is not None:
                    failed.append((str(pieces[key].unit), result.error))
                progress("units", at + count, len(todo))
        progress("units", len(todo), len(todo))
    return Summary(
        path=path,
        skipped=len(there) - len(adopted),
        adopted=len(adopted),
        failed=tuple(failed),
        seconds=time.perf_counter() - start,
        **counts,
    )


def work(job: Job, progress: Progress = silent) -> Outcome:
    """Do one unit, in whatever process."""
    unit, folder, fit = job
    return perform(Unit.from_dict(unit), folder=folder, fit=fit, progress=progress)


def _job(key: str, piece: Piece, path: Path) -> Job:
    fit = str(fit_file(path.parent, piece.hashes["fit"])) if piece.unit.fit is not None else ""
    return piece.unit.to_dict(), str(path.with_suffix(".streams") / key[:16]), fit


def _here(jobs: Sequence[Job], progress: Progress) -> Iterator[Done[Outcome]]:
    """Work in this process, telling how far each unit is: a progress cannot travel."""
    for index, job in enumerate(jobs):
        start = time.perf_counter()
        name = str(Unit.from_dict(job[0]))
        progress(name, 0, 1)
        value, error = None, None
        try:
            value = work(job, progress)
        except ErrataError as refused:
            error = str(refused)
        except Exception:  # a bug in one unit must not lose the others: it is told in its row
            error = traceback.format_exc()
        progress(name, 1, 1)
        yield Done(index, value, error, time.perf_counter() - start)


def _row(key: str, study: str, piece: Piece, done: Done[Outcome]) -> Row:
    about: dict[str, Any] = {
        "key": key,
        "study": study,
        "unit": piece.unit.to_dict(),
        "seconds": done.seconds,
    }
    hashes = {"hashes": dict(piece.hashes)}
    if done.value is None:
        return Row(**about, status="failed", error=done.error or "no result", record=hashes)
    outcome = done.value
    return Row(
        **about,
        metrics=outcome.metrics,
        cases=outcome.cases,
        points=outcome.points,
        record=hashes | dict(outcome.record),
    )
