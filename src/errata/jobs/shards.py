"""Big jobs cut into shards: targets of many requests, moments over much text, scores of many cases.

Each gives what one process gives: workers load the model by its name, so it must be the same
wherever they are, and nothing but their results comes back. Shards of targets and of cases have a
fixed size, so that results do not depend on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

from torch import Tensor

from errata.algebra.moments import SecondMoment
from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.corpus import own_text
from errata.editors.closed_form.moments import Moments
from errata.editors.closed_form.statistics import BATCH_TOKENS, Window, add_up, collect
from errata.editors.closed_form.targets import TargetConfig, Targets, optimise_targets
from errata.edits.file import load_edit
from errata.edits.weights import WeightEdit
from errata.errors import ClusterError, ConfigError, EditStateError
from errata.jobs.cluster import Where, held, map_, room
from errata.jobs.moments import TOKENS, Corpus, text_for
from errata.lm.load import LanguageModel
from errata.measure.metrics import Consistency
from errata.measure.score import Scores, score
from errata.progress import Progress, silent
from errata.requests import Case, Request

Shard = TypeVar("Shard")
Part = TypeVar("Part")

GROUPS = 128
"""Targets of one shard: with six contexts, about one batch of 16,384 tokens."""

CASES = 64
"""Cases of one shard: some 1,500 prompts of CounterFact's."""


@dataclass(frozen=True)
class Source:
    """A model by its name, as every worker loads it."""

    name: str
    dtype: str | None = None
    device: str | None = None

    def model(self) -> LanguageModel:
        """This process' own copy."""
        return held(self.name, self.dtype, self.device)


class Places(TypedDict, total=False):
    """Where shards are done: see `cluster.map_`."""

    on: Where
    workers: int | None
    address: str | None


def _each(
    function: Callable[[Shard], Part], shards: Sequence[Shard], places: Places
) -> Iterator[tuple[int, Part]]:
    """Shard number and result, in the order in which they are finished.

    Raises:
        ClusterError: a shard failed; the others are given up.
    """
    for done in map_(function, shards, **places):
        if done.error is not None:
            raise ClusterError(f"shard {done.index + 1} of {len(shards)} failed: {done.error}")
        assert done.value is not None
        yield done.index, done.value


def _cut(things: Sequence[Part], size: int) -> list[Sequence[Part]]:
    return [things[start : start + size] for start in range(0, len(things), size)]


# ---------------------------------------------------------------------------------------- targets


def targets(
    source: Source,
    groups: Sequence[Sequence[Request]],
    prefixes: Sequence[str],
    layer: int,
    config: TargetConfig,
    *,
    batch_tokens: int = 16384,
    size: int = GROUPS,
    progress: Progress = silent,
    **places: Unpack[Places],
) -> Targets:
    """`optimise_targets` of the unedited model, whose result this is to rounding.

    Args:
        source: the model.
        groups: requests; those of one group share a target.
        prefixes: contexts that stand before each prompt, the empty one among them.
        layer: where targets are found.
        config: the numbers.
        batch_tokens: at most so many tokens are optimised at once, in each worker.
        size: groups of one shard.
        progress: told how many groups are done.
        places: see `cluster.map_`.

    Raises:
        ClusterError: a shard failed.
    """
    work = partial(_targets, source, tuple(prefixes), layer, config, batch_tokens)
    shards = _cut(groups, size)
    found: dict[int, Targets] = {}
    for index, part in _each(work, shards, places):
        found[index] = part
        progress("targets", sum(len(one.loss) for one in found.values()), len(groups))
    return Targets.of(
        [found[i].one(k) for i, shard in enumerate(shards) for k in range(len(shard))]
    )


def _targets(
    source: Source,
    prefixes: Sequence[str],
    layer: int,
    config: TargetConfig,
    batch_tokens: int,
    groups: Sequence[Sequence[Request]],
) -> Targets:
    found = optimise_targets(
        source.model(), groups, prefixes, layer, config, batch_tokens=batch_tokens
    )
    return Targets(found.deltas.cpu(), found.streams.cpu(), found.loss.cpu(), found.failed)


def edit(
    source: Source,
    editor: ClosedForm,
    requests: Sequence[Request],
    *,
    progress: Progress = silent,
    **places: Unpack[Places],
) -> WeightEdit:
    """`editor.edit` of the unedited model, with the targets found by all workers.

    Keys and the solve, which are a small part of the work, are done here.

    Raises:
        ConfigError: the method writes one request after another, as ROME does.
        EditStateError: this process' copy of the model has an edit on it.
        ClusterError: a shard failed.
    """
    if editor.config.one_at_a_time:
        raise ConfigError(
            f"{editor.name} writes one request after another, each on the model that the one "
            "before has changed: there is nothing to share among workers."
        )
    lm = source.model()
    if lm.applied:
        raise EditStateError(
            f"{source.name} has an edit on it here, which the workers' copies lack. Undo it first."
        )
    groups = editor.groups(lm, requests)
    found = targets(
        source,
        groups,
        editor.contexts(lm),
        editor.layers(lm)[-1],
        editor.config.target,
        batch_tokens=editor.batch_tokens,
        progress=progress,
        **places,
    )
    known = {group: found.one(i) for i, group in enumerate(groups)}
    return editor.edit(lm, requests, known=known, progress=progress)


# ---------------------------------------------------------------------------------------- moments


def moments(
    source: Source,
    layers: Sequence[int],
    corpus: Corpus = None,
    *,
    tokens: int = TOKENS,
    cache: Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    **places: Unpack[Places],
) -> Moments:
    """`collect`, whose result this is but for the order in which float64 sums are added.

    Each of `workers` adds up a share of the text and sends 8 d_ff^2 bytes for each layer. The text
    is read and tokenised here, and what is in the cache is not computed again.

    Args:
        source: the model.
        layers: blocks.
        corpus: text, or the model's own kind.
        tokens: how many to read.
        cache: a folder to keep results in.
        batch_tokens: tokens of one forward pass.
        progress: told how many tokens are read.
        places: see `cluster.map_`.

    Raises:
        ClusterError: a share failed.
        MomentError: there is too little text.
    """
    lm = source.model()
    text = text_for(lm, corpus)

    def elsewhere(
        layers: Sequence[int], windows: Sequence[Window]
    ) -> Iterator[dict[int, SecondMoment]]:
        shares = _cut(windows, -(-len(windows) // (places.get("workers") or room())))
        work = partial(_sums, source, tuple(layers), batch_tokens)
        for _, states in _each(work, shares, places):
            yield {layer: SecondMoment.from_state(state) for layer, state in states.items()}

    return collect(
        lm,
        layers,
        own_text(lm, tokens) if text is None else text,
        tokens=tokens,
        cache=cache,
        batch_tokens=batch_tokens,
        elsewhere=elsewhere,
        progress=progress,
    )


def _sums(
    source: Source, layers: Sequence[int], batch_tokens: int, windows: Sequence[Window]
) -> dict[int, dict[str, Tensor]]:
    sums = add_up(source.model(), layers, windows, batch_tokens=batch_tokens)
    return {
        layer: {name: part.cpu() for name, part in moment.state_dict().items()}
        for layer, moment in sums.items()
    }


# ----------------------------------------------------------------------------------------- scores


def scores(
    source: Source,
    cases: Sequence[Case],
    *,
    edit: Path | str | None = None,
    generation: bool = False,
    seed: int = 0,
    size: int = CASES,
    progress: Progress = silent,
    **places: Unpack[Places],
) -> Scores:
    """`measure.score` of a model, with or without an edit, all rows in the cases' order.

    What the model writes freely is drawn anew in each shard, from `seed`: with `generation`, texts
    are other samples than one process draws.

    Args:
        source: the model.
        cases: what to ask.
        edit: an edit file, read by every worker.
        generation: also let the model write, for GE and RS.
        seed: of the free writing.
        size: cases of one shard.
        progress: told how many cases are scored.
        places: see `cluster.map_`.

    Raises:
        ClusterError: a shard failed.
    """
    work = partial(_scores, source, edit, generation, seed)
    shards = _cut(cases, size)
    found: dict[int, Scores] = {}
    for index, part in _each(work, shards, places):
        found[index] = part
        progress("cases", sum(len(one.rows) for one in found.values()), len(cases))
    rows = [row for i in range(len(shards)) for row in found[i].rows]
    references = list(dict.fromkeys(text for case in cases for text in case.references))
    if generation and references:  # a word's weight is counted over all of them
        consistency = Consistency(references)
        for row, case in zip(rows, cases, strict=True):
            if "RS" in row["metrics"]:
                row["metrics"]["RS"] = consistency(row["texts"], case.references)
    return Scores(tuple(rows))


def _scores(
    source: Source, edit: Path | str | None, generation: bool, seed: int, cases: Sequence[Case]
) -> Scores:
    lm = source.model()
    if edit is None:
        return score(lm, cases, generation=generation, seed=seed)
    with load_edit(edit).applied(lm):
        return score(lm, cases, generation=generation, seed=seed)
