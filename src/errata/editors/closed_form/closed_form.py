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
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from errata.algebra.low_rank import LowRank
from errata.algebra.memorize import memorize
from errata.editors.background import Background
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.keys import (
    at_subject,
    context_weights,
    stream_at_subject,
    subject_rows,
)
from errata.editors.closed_form.spread import SPREADS
from errata.editors.closed_form.statistics import Moments
from errata.editors.closed_form.targets import Targets, describe_failures, optimise_targets
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, SolveError, TargetError
from errata.lm.generate import random_prefixes
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import Request, check_batch, unique

logger = logging.getLogger(__name__)

Groups = Sequence[Sequence[Request]]
"""Requests by subject: those of one group have the same key, so they share one target."""


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
        run = self._run(lm, progress)
        # One after another, but never one over another: requests of one key stay together.
        rounds = run.grouped(requests) if self.config.one_at_a_time else [requests]
        changes: dict[int, list[LowRank]] = {layer: [] for layer in run.layers}
        written: list[Request] = []
        failures: list[str] = []
        with restored(lm, run.layers):
            for done, batch in enumerate(rounds):
                told = progress if len(rounds) == 1 else silent
                groups, targets, left_out = run.reached(run.grouped(batch), told)
                failures += left_out
                if groups:
                    for layer, change in run.write_(groups, targets, told):
                        changes[layer].append(change)
                    written += [request for group in groups for request in group]
                if len(rounds) > 1:
                    progress("requests", done + 1, len(rounds))
        if not written:
            raise TargetError("no request could be carried out:\n" + "\n".join(failures) + _ADVICE)
        return self._edit(
            run, {layer: sum_of(parts) for layer, parts in changes.items()}, written, failures
        )

    def edit_each(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> Iterator[WeightEdit | TargetError]:
        """An edit of its own for each request, as if it were the only one; in order.

        The same as `edit(lm, [request])` for each, but all targets are found in one batch first:
        the way to measure single edits. A target that fails gives its error instead of an edit.
        """
        run = self._run(lm, progress)
        groups = [[request] for request in requests]
        targets = run.targets(groups, progress)
        for i, group in enumerate(groups):
            if i in targets.failed:
                yield TargetError(describe_failures({0: targets.failed[i]}, [group]).strip())
                continue
            with restored(lm, run.layers):
                changes = dict(run.write_([group], targets.only([i]), silent))
            yield self._edit(run, changes, group, [])

    def _run(self, lm: LanguageModel, progress: Progress) -> _Run:
        layers = self.layers(lm)
        lm.check_finite([lm.mlp_out_path(layer) for layer in layers])
        moments = self.background.moments(lm, layers, progress=progress)
        return _Run(lm, self.config, layers, self._contexts(lm), moments, self.batch_tokens)

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

    def _edit(
        self,
        run: _Run,
        changes: Mapping[int, LowRank],
        written: Sequence[Request],
        failures: Sequence[str],
    ) -> WeightEdit:
        lm = run.lm
        notes = {
            "left out": failures,
            "contexts": run.contexts,
            "moments": {str(layer): run.moments[layer].key for layer in run.layers},
        }
        config = self.config.to_dict() | {"layers": run.layers}
        return WeightEdit.of(
            lm,
            # In float32, as a file keeps them: an edit is the same before and after saving.
            {lm.mlp_out_path(i): change.to(dtype=torch.float32) for i, change in changes.items()},
            requests=written,
            record=Record.of(
                lm, method=self.name, config=config, seed=self.config.seed, notes=notes
            ),
        )


@dataclass(frozen=True)
class _Run:
    """What stays the same while one model is edited."""

    lm: LanguageModel
    config: ClosedFormConfig
    layers: tuple[int, ...]
    contexts: list[str]
    moments: Mapping[int, Moments]
    batch_tokens: int

    def grouped(self, requests: Sequence[Request]) -> Groups:
        """Requests whose subjects end in the same tokens share one key, so also one target."""
        groups: dict[tuple[int, ...], list[Request]] = {}
        for row, request in zip(subject_rows(self.lm, requests), requests, strict=True):
            groups.setdefault(row, []).append(request)
        return list(groups.values())

    def targets(self, groups: Groups, progress: Progress) -> Targets:
        """Targets at the last edited layer, all groups in one batch."""
        return optimise_targets(
            self.lm,
            groups,
            self.contexts,
            self.layers[-1],
            self.config.target,
            batch_tokens=self.batch_tokens,
            progress=progress,
        )

    def reached(self, groups: Groups, progress: Progress) -> tuple[Groups, Targets, list[str]]:
        """The groups whose target was reached, their targets, and a line on each of the others.

        Raises:
            TargetError: a target was not reached, and the config does not say `keep_going`.
        """
        targets = self.targets(groups, progress)
        if not targets.failed:
            return groups, targets, []
        report = describe_failures(targets.failed, groups)
        if not self.config.keep_going:
            count = len(targets.failed)
            raise TargetError(
                f"{count} of {len(groups)} targets were not reached:\n{report}{_ADVICE}"
            )
        logger.warning("left out:\n%s", report)
        keep = [i for i in range(len(groups)) if i not in targets.failed]
        return [groups[i] for i in keep], targets.only(keep), report.splitlines()

    def write_(
        self, groups: Groups, targets: Targets, progress: Progress
    ) -> Iterator[tuple[int, LowRank]]:
        """Change the model's weights layer by layer, lowest first; yields each layer's change.

        Raises:
            SolveError: the system of a layer has no trustworthy solution; the facts are named.
        """
        heads = [group[0] for group in groups]
        for place, layer in enumerate(self.layers):
            progress("layers", place, len(self.layers))
            keys, residuals = self._keys_and_residuals(heads, place, targets)
            unit = keys.shape[1] if self.config.units == "relative" else 1
            factor = self.moments[layer].factor(layer)
            try:
                change = memorize(keys, residuals, factor, relaxation=self.config.relaxation * unit)
            except SolveError as error:
                named = "\n".join(f"  {i}: {head.text!r}" for i, head in enumerate(heads[:100]))
                raise SolveError(
                    f"block {layer}: {error}\nThe facts, by number:\n{named}"
                ) from error
            weight = weight_out_in(self.lm.mlp_out(layer))
            with torch.no_grad():
                weight.copy_(weight.to(change.left) + change.dense())
            yield layer, change
        progress("layers", len(self.layers), len(self.layers))

    def _keys_and_residuals(
        self, heads: Sequence[Request], place: int, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """Keys (n, d_ff) and residuals (n, d_model) at one layer of the model as edited so far."""
        layer, last = self.layers[place], self.layers[-1]
        rows = [subject_rows(self.lm, heads, prefix) for prefix in self.contexts]
        seen = at_subject(self.lm, rows, layer, batch_tokens=self.batch_tokens)
        weights = context_weights(self.config.averaging, len(self.contexts)).to(seen.keys)
        keys = torch.einsum("p,npd->nd", weights, seen.keys)
        deltas = targets.deltas.to(keys)
        if self.config.target.place == "mlp" and len(self.layers) == 1:
            if self.config.value_at == "averaged":  # v* minus what is said at the averaged key
                said = torch.einsum("p,npd->nd", weights, seen.values)
                return keys, deltas + seen.values[:, 0] - said
            # The original mixture: delta is what D adds at the bare key.
            detectors = self.moments[layer].factor(layer).whiten(keys)
            bare = (detectors * seen.keys[:, 0]).sum(dim=1)
            return keys, deltas * ((detectors * keys).sum(dim=1) / bare)[:, None]
        now = stream_at_subject(self.lm, rows[0], last, batch_tokens=self.batch_tokens)
        missing = targets.streams.to(keys) + deltas - now.to(keys)
        return keys, missing / SPREADS[self.config.spread](len(self.layers) - place)


_ADVICE = (
    "\n  Try another layer, a wider target.clamp or more target.updates; check that the model can "
    "say the target at all; or leave failing requests out with keep_going."
)


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
