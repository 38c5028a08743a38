"""Which layers to edit, asked of the facts themselves: `--layers auto:saliency`, `auto:tracing`.

Both give each layer a number, a profile over the depth. A method that edits `count` layers gets
the `count` blocks that end at the profile's peak, as MEMIT's critical range does: its targets are
written at the last edited block. Near the first block the range is moved up to begin there.

That a fact is found in a layer does not mean that it is best edited there (`errata locate versus`
measures how far it does); the recommendation is a place to begin where nothing else is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from errata.editors import Background
from errata.errors import ConfigError, RequestError
from errata.jobs.methods import editor_for
from errata.jobs.models import is_pocket
from errata.lm.load import LanguageModel
from errata.lm.loss import Example
from errata.locate.saliency import saliency
from errata.locate.tracing import trace_all
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.progress import Progress, silent
from errata.requests import Request

How = Literal["saliency", "tracing"]

PREFIX = "auto:"
"""What a setting `layers` begins with that names a way instead of blocks."""

WAYS = tuple(PREFIX + how for how in get_args(How))
"""What such a setting may say."""

NOTE = "layers"
"""Under which an edit's record tells how its layers were chosen."""

SAMPLE = 32
"""How many facts are looked at, the first ones: enough to tell layers apart."""

NEUTRAL = 64
"""How many ordinary statements saliencies are compared with."""


@dataclass(frozen=True)
class Recommendation:
    """Blocks to edit, and why."""

    layers: tuple[int, ...]
    how: How
    profile: tuple[float, ...]
    """Each block's number; the largest is the peak."""
    why: str
    """In one sentence, for people."""


def recommend_layers(
    lm: LanguageModel,
    requests: Sequence[Request],
    how: How,
    count: int = 1,
    *,
    progress: Progress = silent,
) -> Recommendation:
    """The `count` blocks that end at the peak of the facts' profile.

    Args:
        lm: the model; it is left as it is.
        requests: what is to be edited; the first SAMPLE are looked at.
        how: "saliency": the mean |gradient| of the edits' loss over each block's MLP, standardised
            with ordinary statements on the pocket models, which bring some; "tracing": the mean
            indirect effect of restoring a window of MLPs at the subject's last token.
        count: how many blocks the method edits.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: there is no such way, or the model has fewer blocks than `count`.
        RequestError: there is no request or, for tracing, the model knows none of the facts.
    """
    if how not in get_args(How):
        ways = " and ".join(PREFIX + name for name in get_args(How))
        raise ConfigError(f"layers cannot be chosen by {how!r}; there are {ways}.")
    if not 1 <= count <= lm.layers:
        raise ConfigError(f"cannot choose {count} of the {lm.layers} blocks of {lm.name}.")
    if not requests:
        raise RequestError("there is no fact to choose layers for.")
    sample = requests[:SAMPLE]
    find = _by_saliency if how == "saliency" else _by_tracing
    profile, why = find(lm, sample, progress)
    peak = int(np.argmax(profile))
    layers = ending_at(peak, count)
    return Recommendation(layers, how, profile, f"{PREFIX}{how}: {why}; {_edited(layers)}.")


def ending_at(peak: int, count: int) -> tuple[int, ...]:
    """The `count` blocks that end at `peak`, or the first `count` where it comes earlier."""
    first = max(0, peak - count + 1)
    return tuple(range(first, first + count))


def with_layers(
    lm: LanguageModel,
    requests: Sequence[Request],
    method: str,
    settings: Mapping[str, Any],
    background: Background,
    *,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Recommendation | None]:
    """Settings in which `layers = "auto:..."` has become blocks, and how they were chosen.

    As many blocks are chosen as the method edits by its recipe or default. Settings that name
    blocks, or nothing, come back as they are.

    Raises:
        ConfigError: the text names no way.
        RequestError: the facts cannot tell; the message says to name layers.
    """
    chosen = settings.get("layers")
    if not isinstance(chosen, str):
        return dict(settings), None
    if not chosen.startswith(PREFIX):
        raise ConfigError(
            f"layers = {chosen!r}: give a list of blocks, or {PREFIX}saliency or {PREFIX}tracing."
        )
    others = {name: value for name, value in settings.items() if name != "layers"}
    count = len(editor_for(lm, method, others, background).layers(lm))
    how: Any = chosen.removeprefix(PREFIX)
    advice = recommend_layers(lm, requests, how, count, progress=progress)
    return {**others, "layers": list(advice.layers)}, advice


def neutral_for(lm: LanguageModel, requests: Sequence[Request]) -> list[Example] | None:
    """Ordinary statements about other subjects that a pocket model knows; None for other models."""
    if not is_pocket(lm):
        return None
    encyclopedia = Encyclopedia.load()
    subjects = {request.subject for request in requests}
    others = [fact for fact in encyclopedia.facts if fact.subject not in subjects]
    drawn = stable_random("neutral", 0).sample(others, NEUTRAL)
    return [
        Example(encyclopedia.prompt(fact, encyclopedia.split(fact).seen[0]), fact.object)
        for fact in drawn
    ]


def window_for(lm: LanguageModel) -> int:
    """How many layers one restoration spans: the papers' 10 of 28 and more, fewer in proportion."""
    return min(10, max(1, round(lm.layers * 10 / 28)))


def _by_saliency(
    lm: LanguageModel, requests: Sequence[Request], progress: Progress
) -> tuple[tuple[float, ...], str]:
    found = saliency(
        lm,
        [Example(request.text, request.target) for request in requests],
        neutral=neutral_for(lm, requests),
        modules="mlp",
        progress=progress,
    )
    profile = found.layers if found.standardised is None else found.standardised
    peak = int(np.argmax(profile))
    if found.standardised is None:
        told = f"the edits' gradients are largest in the MLP of block {peak}"
    else:
        told = (
            f"the edits' gradients stand out most in the MLP of block {peak}, "
            f"{profile[peak]:.1f} standard deviations above ordinary statements'"
        )
    return profile, f"{told} ({_facts(len(requests))})"


def _by_tracing(
    lm: LanguageModel, requests: Sequence[Request], progress: Progress
) -> tuple[tuple[float, ...], str]:
    window = window_for(lm)
    found = trace_all(lm, requests, kinds=("mlp",), window=window, progress=progress)
    if not found.traces:
        raise RequestError(
            f"{lm.name} knows none of the {_facts(len(requests))}, and what it does not know "
            f"cannot be traced: {found.skipped[0].why} Name layers instead, or use "
            f"{PREFIX}saliency."
        )
    effects = np.array([trace.effects[trace.subject[1]] for trace in found.traces])
    profile = tuple(effects.mean(axis=0).tolist())
    peak = int(np.argmax(profile))
    told = (
        f"restoring {window} MLP{'' if window == 1 else 's'} around block {peak} at the subject's "
        f"last token brings back {profile[peak]:.2f} of the answer's probability "
        f"({_facts(len(found.traces))}"
    )
    if found.skipped:
        told += f"; {_facts(len(found.skipped))} that {lm.name} does not know left out"
    return profile, told + ")"


def _facts(count: int) -> str:
    return f"{count} fact{'' if count == 1 else 's'}"


def _edited(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"block {layers[0]} is edited"
    return f"blocks {layers[0]} to {layers[-1]} are edited"
