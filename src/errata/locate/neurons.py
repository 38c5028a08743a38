"""Knowledge neurons: where in the MLPs a fact is kept (Dai et al. 2022).

Coarse neurons of a prompt are those whose attribution (`attribution.py`) is at least a share of the
prompt's largest. A fact is asked in several prompts; its knowledge neurons are coarse in more than
a share of them, which is made smaller or larger until there are 2 to 5. If they hold the fact, then
it becomes less likely with them silent and likelier with them amplified, and other facts stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from errata.edits.edit import as_json
from errata.errors import ConfigError, NotFiniteError, RequestError
from errata.lm.hooks import rewritten_input
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, example_batches, losses
from errata.lm.weights import weight_out_in
from errata.locate.attribution import attribution
from errata.progress import Progress, silent

__all__ = [
    "Effect",
    "Neuron",
    "Neurons",
    "Reaction",
    "amplified",
    "attribution",
    "check",
    "coarse_neurons",
    "knowledge_neurons",
    "refined",
    "scaled",
    "suppressed",
]

WANTED = (2, 5)
"""How many knowledge neurons a fact should have."""
ADJUSTMENT, ADJUSTMENTS = 0.05, 6
"""By how much the share of prompts moves to get there, and how often at most (authors' code)."""


@dataclass(frozen=True)
class Neuron:
    """One entry of what goes into a block's last MLP matrix."""

    layer: int
    index: int
    score: float
    """Its attribution, averaged over prompts: its share in the answer's probability."""


@dataclass(frozen=True)
class Neurons:
    """A fact's knowledge neurons."""

    model: str
    prompts: tuple[str, ...]
    """The ways to ask that they were found with."""
    answer: str
    found: tuple[Neuron, ...]
    """The neurons, the highest attribution first."""
    coarse: tuple[int, ...]
    """How many coarse neurons each prompt has."""
    steps: int
    threshold: float
    share: float
    """The share of prompts that was used in the end."""

    def __iter__(self) -> Iterator[Neuron]:
        return iter(self.found)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        record: dict[str, Any] = as_json(self)
        return record

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        return cls(
            **{
                **values,
                "prompts": tuple(values["prompts"]),
                "found": tuple(Neuron(**neuron) for neuron in values["found"]),
                "coarse": tuple(values["coarse"]),
            }
        )


def knowledge_neurons(
    lm: LanguageModel,
    prompts: Sequence[str],
    answer: str,
    *,
    steps: int = 20,
    threshold: float = 0.2,
    share: float = 0.7,
    batch_tokens: int = 2048,
    progress: Progress = silent,
) -> Neurons:
    """The knowledge neurons of the fact that all `prompts` ask for.

    Args:
        lm: a decoder or a masked encoder; it is left as it is.
        prompts: ways to ask; with a single one its coarse neurons are the result.
        answer: the answer that all of them have.
        steps: of the Riemann sum.
        threshold: coarse neurons have at least this share of the prompt's largest attribution.
        share: a neuron must be coarse in more than this share of the prompts, to begin with.
        batch_tokens: at most so many tokens, cached ones included, in one pass.
        progress: called with prompts done.

    Raises:
        ConfigError: the model is of another kind, or a number is out of range.
        NotFiniteError: an attribution is NaN or infinite.
        RequestError: there is no prompt.
        TokenizationError: a prompt or the answer has no token of its own, or a text is too long.
    """
    if not prompts:
        raise RequestError(f"no prompt asks for {answer!r}; give at least one.")
    if not (0 < threshold <= 1 and 0 <= share < 1):
        raise ConfigError(
            f"threshold must be above 0 and at most 1, got {threshold}; "
            f"share must be at least 0 and below 1, got {share}."
        )
    scores = []
    for done, prompt in enumerate(prompts, 1):
        scores.append(attribution(lm, prompt, answer, steps=steps, batch_tokens=batch_tokens))
        progress("attributions", done, len(prompts))
    coarse = [coarse_neurons(one, threshold) for one in scores]
    kept, share = refined(coarse, share)
    mean = torch.stack(scores).mean(dim=0)
    found = [Neuron(layer, index, float(mean[layer, index])) for layer, index in kept]
    return Neurons(
        model=lm.name,
        prompts=tuple(prompts),
        answer=answer,
        found=tuple(sorted(found, key=lambda neuron: -neuron.score)),
        coarse=tuple(map(len, coarse)),
        steps=steps,
        threshold=threshold,
        share=share,
    )


def coarse_neurons(scores: Tensor, threshold: float) -> set[tuple[int, int]]:
    """(layer, index) of the attributions (layers, d_ff) that reach a share of the largest.

    Empty if no attribution is positive: then no neuron speaks for the answer.
    """
    largest = scores.max()
    if largest <= 0:
        return set()
    return {(layer, index) for layer, index in (scores >= threshold * largest).nonzero().tolist()}


def refined(
    coarse: Sequence[set[tuple[int, int]]], share: float
) -> tuple[list[tuple[int, int]], float]:
    """The neurons that are coarse in more than a share of the prompts, and that share.

    It moves by `ADJUSTMENT`, `ADJUSTMENTS` times at most, until there are as many as `WANTED`; it
    stays below 1, where nothing would be left.
    """

    def kept() -> list[tuple[int, int]]:
        every = sorted(set().union(*coarse))
        # Rounded, as 0.7 + 0.05 + 0.05 is more than 0.8.
        return [n for n in every if round(sum(n in one for one in coarse) / len(coarse), 9) > share]

    found = kept()
    for _ in range(ADJUSTMENTS):
        if WANTED[0] <= len(found) <= WANTED[1]:
            break
        moved = round(share + (ADJUSTMENT if len(found) > WANTED[1] else -ADJUSTMENT), 9)
        if not 0 <= moved < 1:
            break
        share = moved
        found = kept()
    return found, share


@contextmanager
def scaled(lm: LanguageModel, neurons: Iterable[Neuron], factor: float) -> Iterator[None]:
    """While open, these neurons' activations are `factor` times what they were, at all positions.

    The authors' code scales them at the predicted position alone; here the neuron itself is weaker
    or stronger, whatever is read or written.

    Raises:
        ConfigError: the model has no such neuron.
        HookError: the model did not run.
    """
    indices: dict[int, list[int]] = {}
    for neuron in neurons:
        indices.setdefault(neuron.layer, []).append(neuron.index)
    for layer, some in indices.items():
        width = weight_out_in(lm.mlp_out(layer)).shape[1] if 0 <= layer < lm.layers else 0
        if min(some) < 0 or max(some) >= width:
            raise ConfigError(
                f"{lm.name} has no neurons {sorted(some)} in layer {layer}: they were found in "
                "another model."
            )
    with ExitStack() as stack:
        for layer, some in indices.items():
            stack.enter_context(rewritten_input(lm.mlp_out(layer), _times(factor, some)))
        yield


def suppressed(lm: LanguageModel, neurons: Iterable[Neuron]) -> AbstractContextManager[None]:
    """While open, these neurons are silent; see `scaled`."""
    return scaled(lm, neurons, 0.0)


def amplified(
    lm: LanguageModel, neurons: Iterable[Neuron], factor: float = 2.0
) -> AbstractContextManager[None]:
    """While open, these neurons speak `factor` times as loud; see `scaled`."""
    return scaled(lm, neurons, factor)


@dataclass(frozen=True)
class Reaction:
    """An answer's probability, and what becomes of it; that of a token, the geometric mean."""

    prompt: str
    answer: str
    before: float
    suppressed: float
    amplified: float


@dataclass(frozen=True)
class Effect:
    """What silencing and amplifying neurons does to their fact and to others."""

    factor: float
    """By which they were amplified."""
    facts: tuple[Reaction, ...]
    others: tuple[Reaction, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        record: dict[str, Any] = as_json(self)
        return record

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        return cls(
            values["factor"],
            tuple(Reaction(**one) for one in values["facts"]),
            tuple(Reaction(**one) for one in values["others"]),
        )


def check(
    lm: LanguageModel,
    neurons: Iterable[Neuron],
    facts: Sequence[Example],
    others: Sequence[Example] = (),
    *,
    factor: float = 2.0,
    batch_tokens: int = 2048,
) -> Effect:
    """Probabilities of answers as they are, with the neurons silent, and amplified.

    Args:
        lm: the model; it is left as it is.
        neurons: knowledge neurons.
        facts: prompts of their fact, also such as they were not found with.
        others: prompts and answers of other facts, which should not change.
        factor: by which the neurons are amplified.
        batch_tokens: at most so many tokens, padding included, in one pass.

    Raises:
        ConfigError: the model has no such neuron.
        NotFiniteError: a probability is NaN.
        RequestError: there is no example.
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
    """
    neurons, examples = list(neurons), [*facts, *others]
    if not examples:
        raise RequestError("there is no fact to check neurons with; give at least one.")
    before = _probabilities(lm, examples, batch_tokens)
    with suppressed(lm, neurons):
        quiet = _probabilities(lm, examples, batch_tokens)
    with amplified(lm, neurons, factor):
        loud = _probabilities(lm, examples, batch_tokens)
    reactions = tuple(
        Reaction(example.prompt, example.answer, *values)
        for example, *values in zip(examples, before, quiet, loud, strict=True)
    )
    return Effect(factor, reactions[: len(facts)], reactions[len(facts) :])


@torch.no_grad()
def _probabilities(
    lm: LanguageModel, examples: Sequence[Example], batch_tokens: int
) -> list[float]:
    found = torch.zeros(len(examples), dtype=torch.float64)
    for group in example_batches(lm, examples, batch_tokens):
        found[group] = (-losses(lm, [examples[i] for i in group])).exp().to(found)
    if not found.isfinite().all():
        lm.check_finite()
        raise NotFiniteError(f"{lm.name} gives probabilities that are not finite.")
    return found.tolist()


def _times(factor: float, indices: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Activations (..., d_ff) with some of them scaled."""

    def rewrite(states: Tensor) -> Tensor:
        factors = states.new_ones(states.shape[-1])
        factors[list(indices)] = factor
        return states * factors

    return rewrite
