"""Every editing problem by several methods in every layer, beside what tracing says of the facts.

The study of Hase et al. 2023 (arXiv:2301.04213): if it matters where a fact is, then at least some
problem, erasing what a state carries, say, should be done best where the fact traces to. Facts are
traced once for all problems and methods. What is done is kept part by part, a file for each seed,
problem and method, so that a study that was cut short goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from errata.edits.edit import as_json
from errata.errors import ConfigError, DatasetError, RequestError
from errata.jobs.cases import sample_cases
from errata.jobs.files import write_text
from errata.jobs.layers import window_for
from errata.jobs.locating.regressions import Located
from errata.jobs.locating.versus import Editing, Effects, Versus, effects, located
from errata.jobs.methods import method_named
from errata.jobs.models import Model, as_model
from errata.jobs.moments import Corpus, background_for
from errata.jobs.variants import posed
from errata.lm.load import LanguageModel
from errata.locate.traces import Skipped
from errata.progress import Progress, silent
from errata.requests import VARIANTS, Case, Request, variant_named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problems:
    """Locating against editing, for each problem and method on one model."""

    model: str
    seeds: tuple[int, ...]
    """Each drew a sample of facts, and everything random in the editors."""
    studies: tuple[Versus, ...]

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Facts that were left out of any study, each reason once."""
        every = {one.why: one for study in self.studies for one in study.skipped}
        return tuple(every.values())

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        record: dict[str, Any] = as_json(self)
        return record

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        studies = tuple(Versus.from_dict(study) for study in values["studies"])
        return cls(values["model"], tuple(values["seeds"]), studies)


@dataclass(frozen=True)
class Part:
    """What one seed's facts gave, as one problem, by one method."""

    facts: tuple[Located, ...]
    skipped: tuple[Skipped, ...]

    @classmethod
    def read(cls, path: Path, about: Mapping[str, Any]) -> Self:
        """A part that is finished.

        Raises:
            DatasetError: the file is none, or of a study with other numbers.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            skipped = [
                Skipped(Request.from_dict(one["request"]), one["predicted"], one["why"])
                for one in values["skipped"]
            ]
            part = cls(tuple(map(Located.from_dict, values["facts"])), tuple(skipped))
            made = values["about"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DatasetError(
                f"{path} is no part of a study that this errata can read ({error!r}); delete it, "
                "and it is made anew."
            ) from error
        if made != as_json(about):
            raise DatasetError(
                f"{path} is a part of another study, of {made}, not of {as_json(about)}. Give a "
                "folder of its own to each study."
            )
        return part

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Keep it, whole or not at all.

        Raises:
            StorageError: the file cannot be written.
        """
        values = {"about": as_json(about), **as_json(self)}
        write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def problems(
    model: Model,
    source: Path | str,
    *,
    methods: Sequence[str],
    variants: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    layers: Sequence[int] | None = None,
    count: int = 10,
    seeds: Sequence[int] = (0,),
    folder: Path | str,
    corpus: Corpus = None,
    progress: Progress = silent,
) -> Problems:
    """Pose, trace and edit each fact as each problem, by each method, in each layer alone.

    Args:
        model: the model or its name, a decoder; it is left as it was.
        source: of facts, as `sample_cases` reads it.
        methods: names in `EDITORS`.
        variants: names in `VARIANTS`; all by default.
        settings: method -> its numbers that differ from the recipe's.
        layers: which to edit; all by default.
        count: facts of each seed; those that the model does not know are left out.
        seeds: of the samples, and of everything random in the editors.
        folder: where finished parts are kept, and looked for.
        corpus: ordinary text for the second moments.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: a method or setting is unknown, or a method does not honour a variant.
        RequestError: a variant is unknown, or fewer than two facts can be posed as any of them.
        DatasetError: there are too few facts, or a part cannot be read.
        StorageError: a part cannot be written.
    """
    variants = variants or tuple(VARIANTS)
    _check(methods, variants)
    lm = as_model(model)
    chosen = tuple(range(lm.layers)) if layers is None else tuple(sorted(set(layers)))
    background = background_for(lm, corpus)
    parts: dict[tuple[str, str], list[Part]] = {}
    total, done = len(seeds) * len(variants) * len(methods), 0
    for seed in seeds:
        asked = _Traced(lm, sample_cases(source, count, seed), progress)
        for variant in variants:
            for method in methods:
                progress("problems and methods", done, total)
                path = Path(folder) / f"{variant}-{method}-seed-{seed}.json"
                values = {"seed": seed, **(settings or {}).get(method, {})}
                about = {"model": lm.name, "facts": str(source), "count": count}
                about |= {"layers": chosen, "settings": values}
                if not path.is_file():
                    editing = Editing.of(lm, method, values, chosen, background, progress)
                    asked.part(variant, editing, progress).write(path, about)
                parts.setdefault((variant, method), []).append(Part.read(path, about))
                done += 1
    progress("problems and methods", done, total)
    found = [_together(lm, *names, chosen, some) for names, some in parts.items()]
    if not any(found):
        raise RequestError(
            f"{lm.name} knows too few of the facts to compare them. Give more that it knows."
        )
    return Problems(lm.name, tuple(seeds), tuple(study for study in found if study))


class _Traced:
    """One seed's facts, traced when first needed."""

    def __init__(self, lm: LanguageModel, cases: Sequence[Case], progress: Progress) -> None:
        self.lm = lm
        self.cases = cases
        self.progress = progress
        self._effects: Effects | None = None

    def part(self, variant: str, editing: Editing, progress: Progress) -> Part:
        """Edit the facts, as one problem."""
        if self._effects is None:
            window = window_for(self.lm)
            self._effects = effects(self.lm, self.cases, window=window, progress=self.progress)
        cases, skipped = posed(self.lm, self.cases, variant)
        known = [case for case in cases if case.request.text in self._effects.state]
        found = located(self.lm, known, self._effects, editing, progress=progress)
        return Part(tuple(found), (*skipped, *self._effects.skipped))


def _together(
    lm: LanguageModel, variant: str, method: str, layers: Sequence[int], parts: Sequence[Part]
) -> Versus | None:
    """The study of all seeds' facts; None where too few could be posed as this problem."""
    facts = [fact for part in parts for fact in part.facts]
    if len(facts) < 2:
        logger.warning(
            "%s by %s is left out: %d of the facts can be posed so.", variant, method, len(facts)
        )
        return None
    return Versus.of(
        model=lm.name,
        method=method,
        window=window_for(lm),
        layers=layers,
        variant=variant,
        facts=facts,
        skipped=[one for part in parts for one in part.skipped],
    )


def _check(methods: Sequence[str], variants: Sequence[str]) -> None:
    for variant in variants:
        variant_named(variant)
    for method in methods:
        if unable := [v for v in variants if v not in method_named(method).editor.variants]:
            raise ConfigError(f"{method} cannot do {', '.join(unable)}; choose other variants.")
