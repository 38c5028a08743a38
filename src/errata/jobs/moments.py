"""Ordinary text and the second moments taken over it: what every edit must preserve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.editors import Background
from errata.editors.closed_form import statistics
from errata.editors.closed_form.corpus import own_text, read_corpus
from errata.editors.closed_form.moment_cache import cache_folder
from errata.editors.closed_form.moments import Moments
from errata.jobs.cases import POCKET
from errata.jobs.methods import editor_for
from errata.jobs.models import Model, as_model, is_pocket
from errata.lm.load import LanguageModel
from errata.pocket.encyclopedia import Encyclopedia
from errata.progress import Progress, silent

Corpus = str | Path | Iterable[str] | None
"""Text: a file, a folder, `hub:NAME`, `pocket`, or strings; None for the model's own kind."""

TOKENS = 100_000
"""How much text is read unless told otherwise."""


def text_for(model: Model, corpus: Corpus) -> Corpus:
    """The text to use: a pocket model's own statements where no text is named.

    None stays None for other models, which then write their own.
    """
    if corpus == POCKET or (corpus is None and is_pocket(model)):
        return Encyclopedia.load().statements().splitlines()
    return corpus


def background_for(
    lm: LanguageModel, corpus: Corpus = None, tokens: int | None = None, *, remember: int = 0
) -> Background:
    """What a method may know of a model beside the requests; moments are kept on disk.

    `remember` sets of targets are kept in memory (see `Background`).
    """
    return Background(
        text_for(lm, corpus), tokens or TOKENS, cache=cache_folder(), remember=remember
    )


def moments_folder() -> Path:
    """Where moments are kept; set ERRATA_CACHE to keep them elsewhere."""
    return cache_folder() / "moments"


@dataclass(frozen=True)
class Plan:
    """A pass over text that has not begun, and what it will cost."""

    lm: LanguageModel
    layers: tuple[int, ...]
    tokens: int
    corpus: Corpus
    corpus_name: str
    seconds: float
    nbytes: int
    """Memory beside the model."""
    folder: Path


def plan(
    model: Model,
    *,
    layers: Sequence[int] | None = None,
    method: str = "memit",
    corpus: Corpus = None,
    tokens: int | None = None,
    progress: Progress = silent,
) -> Plan:
    """Say what the second moments of some layers will cost, from a sample that is run now.

    Args:
        model: the model or its name.
        layers: blocks; those that `method` edits by default.
        method: a name in `EDITORS`.
        corpus: ordinary text.
        tokens: how many to read.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the model has no such layer, or the method is unknown.
        DatasetError: the text is not there.
    """
    lm = as_model(model)
    wanted = tokens or TOKENS
    if layers is None:
        layers = editor_for(lm, method, {}, background_for(lm)).layers(lm)
    text = text_for(lm, corpus)
    name = f"{lm.name}'s own text" if text is None else _name(lm, corpus, text)
    progress("measuring this machine", 0, 1)
    cost = statistics.estimate(lm, layers, wanted)
    progress("measuring this machine", 1, 1)
    return Plan(lm, tuple(layers), wanted, text, name, cost.seconds, cost.bytes, moments_folder())


def compute(plan: Plan, *, progress: Progress = silent) -> Moments:
    """Run the pass of a plan; what is cached already is only read.

    Raises:
        MomentError: the text is too short.
        NotFiniteError: the model gives NaN or infinite keys.
    """
    text = plan.corpus
    if text is None:
        text = own_text(plan.lm, plan.tokens, progress=progress)
    return statistics.collect(
        plan.lm, plan.layers, text, tokens=plan.tokens, cache=cache_folder(), progress=progress
    )


def _name(lm: LanguageModel, corpus: Corpus, text: Corpus) -> str:
    if corpus is None or corpus == POCKET:
        return "the pocket encyclopedia's statements"
    assert text is not None
    return read_corpus(text).name
