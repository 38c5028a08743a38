"""One editor under ROME, MEMIT and EMMET: targets, keys, one solve, and a rule to spread it.

Preservation and memorisation (A Unified Framework for Model Editing): write keys K with residuals
R while disturbing what old keys say as little as possible. The three methods are this editor with
other defaults; any objective (`relaxation`) runs with any distribution (`layers`, `spread`) and
any target (`target.place`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from errata.algebra.low_rank import LowRank
from errata.algebra.memorize import memorize
from errata.editors.closed_form.keys import (
    Averaging,
    at_subject,
    context_weights,
    stream_at_subject,
    subject_rows,
)
from errata.editors.closed_form.spread import SPREADS
from errata.editors.closed_form.statistics import Moments
from errata.editors.closed_form.targets import (
    TargetConfig,
    Targets,
    describe_failures,
    optimise_targets,
)
from errata.editors.background import Background
from errata.editors.editor import Config
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, TargetError
from errata.lm.generate import random_prefixes
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import Request, check_batch, unique

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClosedFormConfig(Config):
    """Numbers of the closed-form family; each method's own defaults are in its file."""

    layers: tuple[int, ...] = ()
    """Edited blocks, ascending; targets are found at the last. Empty: the method's share of the depth."""
    relaxation: float = 0.0
    """Lambda of the solve, in units of the key's width d_ff (`absolute`: as it is). 0 is the equality
    constraint; MEMIT's mom2_update_weight is `absolute`."""
    units: Literal["relative", "absolute"] = "relative"
    """What `relaxation` is measured in."""
    spread: str = "even"
    """How the residual is divided among layers: a name in SPREADS."""
    averaging: Averaging = "mean"
    """How a request's key is averaged over contexts."""
    value_at: Literal["averaged", "bare"] = "averaged"
    """Where the written value is reckoned: at the averaged key itself (consistent), or at the bare
    prompt's key while the averaged key says when (ROME's original mixture)."""
    prefixes: tuple[tuple[int, int], ...] = ((5, 10),)
    """Random contexts beside the bare prompt: (how many, of how many tokens) each."""
    contexts: tuple[str, ...] = ()
    """Contexts given as text, instead of random ones; the bare prompt is always among them."""
    one_at_a_time: bool = False
    """Carry out requests one after another on the edited model instead of in one batch."""
    keep_going: bool = False
    """Leave out requests whose target fails, instead of failing as a whole."""
    seed: int = 0
    """Of the random contexts."""
    target: TargetConfig = field(default_factory=TargetConfig)

    def __post_init__(self) -> None:
        """Refuse numbers that contradict each other."""
        ascending = list(self.layers) == sorted(set(self.layers)) and all(
            l >= 0 for l in self.layers
        )
        self._require(
            ascending, f"layers must be ascending, unique and not negative, got {self.layers}."
        )
        self._require(
            self.relaxation >= 0, f"relaxation must not be negative, got {self.relaxation}."
        )
        self._require(
            self.spread in SPREADS, f"spread is one of {sorted(SPREADS)}, not {self.spread!r}."
        )
        self._require(
            self.averaging in ("mean", "half-bare", "bare"), f"no averaging {self.averaging!r}."
        )
        self._require(self.value_at in ("averaged", "bare"), f"no value_at {self.value_at!r}.")
        self._require(self.units in ("relative", "absolute"), f"no units {self.units!r}.")
        mixture = self.value_at == "bare" and self.averaging != "bare"
        self._require(
            not mixture or self.one_at_a_time,
            "value_at = 'bare' mixes two keys, which only makes sense for one request at a time.",
        )


class ClosedForm:
    """The closed-form editor; ROME, MEMIT and EMMET are its subclasses by config."""

    name: ClassVar[str]
    depth: ClassVar[tuple[float, float]]
    """Where in the network to edit when no layers are given: first and last block over depth."""

    def __init__(
        self, config: ClosedFormConfig, background: Background, *, batch_tokens: int = 16384
    ) -> None:
        """Keep the numbers and where ordinary text comes from.

        Args:
            config: the method's numbers.
            background: ordinary text of the model, for the second moments of old keys.
            batch_tokens: at most so many tokens are run at once: memory, not results.
        """
        self.config = config
        self.background = background
        self.batch_tokens = batch_tokens
        self._prefixes: WeakKeyDictionary[PreTrainedModel, list[str]] = WeakKeyDictionary()

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The blocks to edit.

        Raises:
            ConfigError: a layer is beyond the model's depth.
        """
        if not self.config.layers:
            first, last = (round(share * lm.layers) for share in self.depth)
            return tuple(range(first, min(last, lm.layers - 1) + 1))
        if self.config.layers[-1] >= lm.layers:
            raise ConfigError(
                f"{lm.name} has blocks 0 to {lm.layers - 1}, not {self.config.layers[-1]}."
            )
        return self.config.layers

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> WeightEdit:
        """Compute the change; the model is bit for bit as before, whatever happens.

        Raises:
            RequestError: two requests contradict each other.
            TargetError: targets failed (all of them, with `keep_going`); they are named.
            SolveError: the equality constraint cannot be met, or the moments are singular.
            NotFiniteError: keys or weights are NaN or infinite.
        """
        requests = unique(requests)
        check_batch(requests)
        layers = self.layers(lm)
        moments = self.background.moments(lm, layers, progress=progress)
        contexts = self._contexts(lm)
        rounds = [[request] for request in requests] if self.config.one_at_a_time else [requests]
        changes: dict[int, list[LowRank]] = {layer: [] for layer in layers}
        written: list[Request] = []
        failures: list[str] = []
        with restored(lm, layers):
            for number, batch in enumerate(rounds):
                inner = progress if len(rounds) == 1 else silent
                done = self._write(lm, batch, layers, contexts, moments, changes, failures, inner)
                written += done
                if len(rounds) > 1:
                    progress("requests", number + 1, len(rounds))
        if not written:
            raise TargetError("no request could be carried out:\n" + "\n".join(failures) + _ADVICE)
        # In float32, as a file keeps them, so that an edit is the same before and after saving.
        return WeightEdit.of(
            lm,
            {
                lm.mlp_out_path(i): sum_of(parts).to(dtype=torch.float32)
                for i, parts in changes.items()
            },
            requests=written,
            record=Record.of(
                lm,
                method=self.name,
                config=self.config.to_dict() | {"layers": layers},
                seed=self.config.seed,
                notes={
                    "left out": failures,
                    "contexts": contexts,
                    "moments": {str(layer): moments[layer].key for layer in layers},
                },
            ),
        )

    def _write(
        self,
        lm: LanguageModel,
        batch: Sequence[Request],
        layers: Sequence[int],
        contexts: Sequence[str],
        moments: Mapping[int, Moments],
        changes: dict[int, list[LowRank]],
        failures: list[str],
        progress: Progress,
    ) -> list[Request]:
        """Write one batch into the weights of `lm`, noting each layer's change; the requests written."""
        config = self.config
        groups = grouped(lm, batch, contexts)
        last = layers[-1]
        targets = optimise_targets(
            lm,
            groups,
            contexts,
            last,
            config.target,
            batch_tokens=self.batch_tokens,
            progress=progress,
        )
        if targets.failed:
            report = describe_failures(targets.failed, groups)
            if not config.keep_going:
                raise TargetError(
                    f"{len(targets.failed)} targets were not reached:\n{report}{_ADVICE}"
                )
            logger.warning("left out:\n%s", report)
            failures += report.splitlines()
            keep = [i for i in range(len(groups)) if i not in targets.failed]
            groups = [groups[i] for i in keep]
            targets = Targets(targets.deltas[keep], targets.streams[keep], targets.loss[keep], {})
            if not groups:
                return []
        heads = [group[0] for group in groups]
        for place, layer in enumerate(layers):
            progress("layers", place, len(layers))
            keys, residuals = self._keys_and_residuals(
                lm, heads, contexts, layers, place, targets, moments
            )
            width = keys.shape[1]
            change = memorize(
                keys,
                residuals,
                moments[layer].factor(layer),
                relaxation=config.relaxation * (width if config.units == "relative" else 1),
            )
            weight = weight_out_in(lm.mlp_out(layer))
            with torch.no_grad():
                weight.copy_(weight.double() + change.dense().to(weight.device))
            changes[layer].append(change)
        progress("layers", len(layers), len(layers))
        return [request for group in groups for request in group]

    def _keys_and_residuals(
        self,
        lm: LanguageModel,
        heads: Sequence[Request],
        contexts: Sequence[str],
        layers: Sequence[int],
        place: int,
        targets: Targets,
        moments: Mapping[int, Moments],
    ) -> tuple[Tensor, Tensor]:
        """Keys (n, d_ff) and residuals (n, d_model) at one layer of the model as edited so far."""
        config, layer = self.config, layers[place]
        rows = [subject_rows(lm, heads, prefix) for prefix in contexts]
        seen = at_subject(lm, rows, layer, batch_tokens=self.batch_tokens)
        weights = context_weights(config.averaging, len(contexts)).to(seen.keys.device)
        keys = torch.einsum("p,npd->nd", weights, seen.keys)
        deltas = targets.deltas.to(keys.device)
        if config.target.place == "mlp" and len(layers) == 1:
            if config.value_at == "averaged":  # v* minus what the layer says at the averaged key
                return keys, deltas + seen.values[:, 0] - torch.einsum(
                    "p,npd->nd", weights, seen.values
                )
            # The original mixture: `D` adds delta at the bare key, along the averaged key's direction.
            detectors = moments[layer].factor(layer).whiten(keys)
            gain = (detectors * keys).sum(dim=1) / (detectors * seen.keys[:, 0]).sum(dim=1)
            return keys, deltas * gain[:, None]
        now = stream_at_subject(lm, rows[0], layers[-1], batch_tokens=self.batch_tokens).to(
            keys.device
        )
        missing = targets.streams.to(keys.device) + deltas - now
        return keys, missing / SPREADS[config.spread](len(layers) - place)

    def _contexts(self, lm: LanguageModel) -> list[str]:
        """The bare prompt first, then given or random prefixes; sampled once per model."""
        if self.config.contexts:
            return ["", *(text for text in self.config.contexts if text)]
        if lm.network not in self._prefixes:
            self._prefixes[lm.network] = [
                prefix
                for i, (count, length) in enumerate(self.config.prefixes)
                for prefix in random_prefixes(
                    lm, count=count, length=length, seed=self.config.seed + 1000 * i
                )
            ]
        return ["", *self._prefixes[lm.network]]


_ADVICE = (
    "\n  Try another layer, a wider target.clamp or more target.updates; check that the model can say "
    "the target at all; or leave failing requests out with keep_going."
)


def grouped(
    lm: LanguageModel, requests: Sequence[Request], contexts: Sequence[str]
) -> list[list[Request]]:
    """Requests whose subjects end in the same tokens share one key, so they must share one target."""
    groups: dict[tuple[int, ...], list[Request]] = {}
    for row, request in zip(subject_rows(lm, requests), requests, strict=True):
        groups.setdefault(row, []).append(request)
    return list(groups.values())


def sum_of(parts: Sequence[LowRank]) -> LowRank:
    """The sum of changes to one weight, still in factors."""
    if len(parts) == 1:
        return parts[0]
    return LowRank(torch.cat([p.left for p in parts], dim=1), torch.cat([p.right for p in parts]))


@contextmanager
def restored(lm: LanguageModel, layers: Sequence[int]) -> Iterator[None]:
    """Give back the edited layers' weights bit for bit at the end."""
    copies = {layer: weight_out_in(lm.mlp_out(layer)).clone() for layer in layers}
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, copy in copies.items():
                weight_out_in(lm.mlp_out(layer)).copy_(copy)
