"""What an experiment will cost, before it runs: time and memory, from a sample that is run now.

A model that is here edits and scores a few cases of its first unit; the rest is multiplication.
Targets that units share are counted once, as one process finds them. A model that is not here is
reckoned from its shape. The sample then runs on another model, whose floating-point operations are
counted: divided by those of a token they say how many tokens' worth of work a case is. What a token
costs the other model is known from its shape, and how fast this machine is from a matrix product.
Such a figure is an estimate, good to a factor of two or so, and is marked as one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from errata.editors import Background
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.moments import Moments
from errata.editors.closed_form.statistics import estimate
from errata.editors.editor import Editor
from errata.editors.trainable import Trainable
from errata.editors.training import TrainingConfig
from errata.errors import ConfigError, ErrataError
from errata.jobs.cases import POCKET as POCKET_CASES
from errata.jobs.cases import POCKET_SOURCES, sample_cases
from errata.jobs.cluster import held
from errata.jobs.methods import editor_for, learns, method_named
from errata.jobs.models import is_ready, same_shape
from errata.jobs.moments import TOKENS
from errata.jobs.score import observation
from errata.jobs.studies.declared import declared
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.fits import fit_file, training_cases
from errata.jobs.studies.host import peak_memory
from errata.jobs.studies.protocols import editor_of
from errata.jobs.studies.rows import to_json
from errata.jobs.studies.run import FOLDER, chosen, keyed, store_path
from errata.jobs.studies.scoring import scored, unedited_answers
from errata.jobs.studies.store import Store
from errata.jobs.studies.units import UNEDITED, Unit, config_of, settings_of
from errata.jobs.studies.workload import Rates, Work, total
from errata.lm.load import POCKET, LanguageModel
from errata.lm.shape import Shape, shape_named
from errata.lm.weights import weight_out_in
from errata.measure.drift import drift
from errata.progress import Progress, silent
from errata.requests import Case

SAMPLE = 6
"""Cases that are edited and scored to measure a model."""

STAND_IN = POCKET[0]
"""Edits and scores the sample for a model that is not here."""

EFFICIENCY = 0.7
"""Share of a plain matrix product's speed that a whole model reaches."""

How = Literal["measured", "estimated"]

Measure = Callable[[Callable[[], object]], float]
"""What running something costs."""


@dataclass(frozen=True)
class Cost:
    """Of all units of one model."""

    model: str
    units: int
    work: Work
    seconds: float
    """In one process, one unit after another."""
    nbytes: int
    """Memory of one process."""
    how: How
    fits: int = 0
    """Of editors that must learn first, with all their steps; those there already left out."""


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    units: tuple[Unit, ...]
    finished: int
    """Units that are done already, and not among these."""
    costs: tuple[Cost, ...]
    absent: tuple[str, ...] = ()
    """Data that are not here either; the stand-in answered cases of its own."""

    @property
    def fits(self) -> int:
        """Editors to be fitted."""
        return sum(cost.fits for cost in self.costs)

    @property
    def seconds(self) -> float:
        """Of all of it, in one process."""
        return sum(cost.seconds for cost in self.costs)


def plan(
    experiment: Experiment,
    *,
    folder: Path | str = FOLDER,
    only: str | None = None,
    progress: Progress = silent,
) -> Plan:
    """Say what `errata.jobs.studies.run.run` would do and what that costs.

    Args:
        experiment: what to do.
        folder: where results are kept.
        only: only units whose description has this text in it.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: a model is neither here nor described in the file.
        DatasetError: a source has too few cases.
    """
    declared(experiment)
    units = chosen(experiment, only)
    here = {unit.model: is_ready(unit.model) for unit in units}
    todo = _unfinished([unit for unit in units if here[unit.model]], experiment, folder)
    finished = sum(here[unit.model] for unit in units) - len(todo)
    todo += [unit for unit in units if not here[unit.model]]
    costs = []
    models = list(dict.fromkeys(unit.model for unit in todo))
    for number, model in enumerate(models):
        progress("measuring a sample", number, len(models))
        mine = [unit for unit in todo if unit.model == model]
        if here[model]:
            costs.append(_measured(mine, _to_fit(mine, Path(folder))))
        else:
            costs.append(_estimated(mine, _shape(experiment, model)))
    progress("measuring a sample", len(models), len(models))
    absent = {unit.data for unit in todo if not _is_here(unit.data)}
    return Plan(tuple(todo), finished, tuple(costs), tuple(sorted(absent)))


def _unfinished(units: Sequence[Unit], experiment: Experiment, folder: Path | str) -> list[Unit]:
    path = store_path(experiment, folder)
    if not units or not path.exists():
        return list(units)
    with Store(path, read_only=True) as store:
        statuses = store.statuses()
    pieces = keyed(units).items()
    return [piece.unit for key, piece in pieces if statuses.get(key) != "done"]


def _to_fit(units: Sequence[Unit], folder: Path) -> list[Unit]:
    """A unit for each fit that is not there yet."""
    pieces = keyed([unit for unit in units if unit.fit is not None])
    fits = {piece.hashes["fit"]: piece.unit for piece in pieces.values()}
    return [unit for key, unit in fits.items() if not fit_file(folder, key).exists()]


def _measured(units: Sequence[Unit], to_fit: Sequence[Unit]) -> Cost:
    """The cost on a model that is here."""
    unit = _typical(units)
    lm = held(unit.model, unit.dtype, unit.device)
    work = total(units)
    seconds = _rates(unit, lm, _seconds).of(work) + _fitting(to_fit, lm, _seconds)
    layers = sorted(_with_moments(units, lm.layers))
    if layers:
        seconds += estimate(lm, layers, unit.corpus_tokens or TOKENS).seconds
    nbytes = (peak_memory() or 0) + _factors(_width(lm), len(layers))
    return Cost(unit.model, len(units), work, seconds, nbytes, "measured", len(to_fit))


def _estimated(units: Sequence[Unit], shape: Shape) -> Cost:
    """The cost on a model of which only the shape is known."""
    unit = _typical(units)
    known = shape_named(STAND_IN)
    assert known is not None
    lm = held(STAND_IN)
    rates = _rates(_on_stand_in(unit, shape, known), lm, _flops)
    speed = EFFICIENCY * _speed()
    work = total(units)
    to_fit = list({_asked_of_fit(u): u for u in units if u.fit is not None}.values())
    flops = rates.of(work) + _fitting([_on_stand_in(u, shape, known) for u in to_fit], lm, _flops)
    seconds = flops / known.flops * shape.flops / speed
    layers = _with_moments(units, shape.layers)
    if layers:
        read = (unit.corpus_tokens or TOKENS) * (shape.flops + len(layers) * shape.d_ff**2)
        seconds += (read + len(layers) * shape.d_ff**3) / speed
    width = 2 if unit.dtype in ("float16", "bfloat16") else 4
    nbytes = width * shape.parameters + _factors(shape.d_ff, len(layers)) + (1 << 29)
    return Cost(unit.model, len(units), work, seconds, nbytes, "estimated", len(to_fit))


def _on_stand_in(unit: Unit, shape: Shape, known: Shape) -> Unit:
    """The same work on the stand-in: with the model's own numbers, at the same relative depth."""
    settings: dict[str, Any] = {}
    if unit.method != UNEDITED:
        settings = config_of(unit).to_dict()
        layers = _layers(unit, shape.layers)
        settings["layers"] = sorted({layer * known.layers // shape.layers for layer in layers})
    unit = replace(unit, model=STAND_IN, settings=settings, dtype=None, device=None)
    if not _is_here(unit.data):
        unit = replace(unit, data=POCKET_CASES)
    if unit.fit is not None and not _is_here(unit.fit["data"]):
        # Of how many cases a fit is made hardly matters: its cost is that of its steps.
        unit = replace(unit, fit={"data": POCKET_CASES, "count": None, "clear_of": SAMPLE})
    return unit


def _is_here(data: str) -> bool:
    return data in POCKET_SOURCES or Path(data).exists()


def _asked_of_fit(unit: Unit) -> str:
    """What tells a fit from another, where neither model nor cases are here to be hashed."""
    config = config_of(unit).to_dict()
    return to_json([unit.method, config, unit.fit, unit.data, unit.seed, unit.dtype])


def _typical(units: Sequence[Unit]) -> Unit:
    """The first unit that edits, as a stream and with free text, if any does."""
    return max(
        units, key=lambda u: (u.method != UNEDITED, u.protocol == "sequential", u.generation)
    )


def _with_moments(units: Sequence[Unit], depth: int) -> set[int]:
    """The blocks whose second moments are needed, in a model of so many."""
    return {
        layer
        for unit in units
        if unit.method != UNEDITED
        and issubclass(method_named(unit.method).config, ClosedFormConfig)
        for layer in _layers(unit, depth)
    }


def _layers(unit: Unit, depth: int) -> tuple[int, ...]:
    """The blocks that a unit edits in a model of so many; none where its fit finds them."""
    if unit.method == UNEDITED:
        return ()
    config = config_of(unit)
    if learns(unit.method):
        return config.layers
    first, last = (round(share * depth) for share in method_named(unit.method).editor.depth)
    return config.layers or tuple(range(first, last + 1))


def _factors(width: int, layers: int) -> int:
    """Bytes of second moments in float32 and of their factors in float64."""
    return 12 * width**2 * layers


def _width(lm: LanguageModel) -> int:
    return weight_out_in(lm.mlp_out(0)).shape[1]


def _shape(experiment: Experiment, model: str) -> Shape:
    told = experiment.about_models.get(model, {})
    numbers = [told.get(name) for name in ("layers", "d_model", "d_ff", "vocabulary")]
    if all(isinstance(number, int) for number in numbers):
        return Shape.of(*numbers)  # type: ignore[arg-type]
    if (shape := shape_named(same_shape(model))) is not None:
        return shape
    raise ConfigError(
        f"the model {model!r} is not on this machine, nor is its config.json. To reckon what it "
        f'costs, say in the file:\n  [model."{model}"]\n  layers = 48\n  d_model = 1600\n'
        "  d_ff = 6400\n  vocabulary = 50257"
    )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _flops(run: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    # To count by module it hooks the backward pass, which `torch.autograd.grad` does not stand.
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    with counter:
        run()
    return float(counter.get_total_flops())


class _Whole(nullcontext[None]):
    """Tells no module from another."""

    parents = ("Global",)

    def __exit__(self, *_: object) -> None:
        """Called without arguments too."""


def _speed() -> float:
    """Floating-point operations in a second, of a matrix product in float32."""
    side = 1024
    a, b = torch.rand(side, side), torch.rand(side, side)
    a @ b  # the first one starts threads
    return 2 * side**3 / min(_seconds(lambda: a @ b) for _ in range(5))


def _rates(unit: Unit, lm: LanguageModel, cost: Measure) -> Rates:
    """What each kind of work costs, in whatever `cost` tells, from a few of the unit's cases."""
    count = SAMPLE if unit.count is None else min(unit.count, SAMPLE)
    cases = sample_cases(unit.data, count, unit.seed)
    plain = replace(unit, generation=False)
    before = unedited_answers(lm, cases, unit)
    scoring = cost(lambda: [scored(lm, [case], plain, before) for case in cases])
    texts = point = first = again = 0.0
    if unit.generation:
        texts = cost(lambda: scored(lm, cases[:2], unit, before, texts=2)) / len(cases[:2])
    if unit.protocol == "sequential" and lm.kind == "decoder":
        seen = observation(lm, cases)
        point = cost(lambda: drift(lm, seen))
    if unit.fit is not None:
        # Nothing is fitted to find out: a step of the fit makes as many edits, and more of each.
        first = count * _step(unit, lm, cost) / _edits_in_a_step(unit)
    elif unit.method != UNEDITED:
        editor, ahead = _ready(unit, lm), unit.protocol != "sequential"
        first = cost(lambda: _write(editor, lm, cases, ahead=ahead))
        if ahead and isinstance(editor.config, ClosedFormConfig):
            again = cost(lambda: _write(editor, lm, cases, ahead=ahead))  # it knows the targets now
    return Rates(
        target=max(0.0, first - again) / count,
        edit=again / count,
        scored=scoring / count,
        point=point,
        text=texts,
    )


def _fitting(to_fit: Sequence[Unit], lm: LanguageModel, cost: Measure) -> float:
    """What fits cost, with all their steps; those that differ in their seed alone cost the same."""
    alike: dict[str, list[Unit]] = {}
    for unit in to_fit:
        alike.setdefault(_asked_of_fit(replace(unit, seed=0)), []).append(unit)
    found = 0.0
    for units in alike.values():
        step, steps = _step(units[0], lm, cost), _cut_short(units[0], lm, 0)
        found += len(units) * step * steps
    return found


def _step(unit: Unit, lm: LanguageModel, cost: Measure) -> float:
    """What a step of a fit costs, in whatever `cost` tells."""
    one, three = (cost(partial(_cut_short, unit, lm, steps)) for steps in (1, 3))
    return max(0.0, three - one) / 2


class _EnoughSteps(Exception):
    """Ends a fit that is only measured."""


def _cut_short(unit: Unit, lm: LanguageModel, steps: int) -> int:
    """Begin a fit, for so many steps; how many it would make."""
    all_steps = 0

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal all_steps
        if stage == "steps":
            all_steps = total
            if done >= steps:
                raise _EnoughSteps

    method, _ = editor_of(replace(unit, settings=settings_of(unit)), lm, ())
    assert isinstance(method, Trainable)
    cases = training_cases(unit)
    # What comes before the first step, such as choosing blocks by all cases, is not counted.
    few = replace(cases, train=cases.train[: SAMPLE * _edits_in_a_step(unit)])
    with suppress(_EnoughSteps):
        method.fit(lm, few, progress=watch)
    return all_steps


def _edits_in_a_step(unit: Unit) -> int:
    training = getattr(config_of(unit), "training", None)
    return training.batch if isinstance(training, TrainingConfig) else 1


def _ready(unit: Unit, lm: LanguageModel) -> Editor:
    """The unit's editor, with all that is computed once; of any moments, which cost the same."""
    layers = _layers(unit, lm.layers)
    moments = Moments.of(dict.fromkeys(layers, torch.eye(_width(lm))), device=lm.device)
    editor = editor_for(lm, unit.method, settings_of(unit), Background(given=moments, remember=1))
    editor.prepare(lm)
    for layer in layers:
        moments.factor(layer)
    return editor


def _write(editor: Editor, lm: LanguageModel, cases: Sequence[Case], *, ahead: bool) -> None:
    """Make each case's edit; a stream cannot look for targets ahead."""
    batches = [[case.request] for case in cases]
    if ahead:
        list(editor.edit_each(lm, batches))
        return
    for batch in batches:
        with suppress(ErrataError):
            editor.edit(lm, batch)
