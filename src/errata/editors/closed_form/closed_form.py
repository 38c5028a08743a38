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

import torch
from torch import Tensor

from errata.algebra.low_rank import LowRank
from errata.algebra.memorize import memorize
from errata.editors.background import Background
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.keys import (
    at_subject,
    context_weights,
    stream_at_subject,
    subject_rows,
    subject_veils,
)
from errata.editors.closed_form.moments import Moments
from errata.editors.closed_form.spread import SPREADS
from errata.editors.closed_form.targets import (
    Target,
    Targets,
    describe_failures,
    optimise_targets,
)
from errata.editors.contexts import Contexts
from errata.editors.editor import Editor
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, SolveError, TargetError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import VARIANTS, Request, check_batch, unique

logger = logging.getLogger(__name__)

Group = tuple[Request, ...]
"""Requests about one subject: they have the same key, so they share one target."""

Groups = Sequence[Group]


class ClosedForm(Editor):
    """The closed-form editor; ROME, MEMIT and EMMET are its subclasses by config."""

    variants: ClassVar[frozenset[str]] = frozenset(VARIANTS)
    config: ClosedFormConfig

    def __init__(
        self, config: ClosedFormConfig, background: Background, *, batch_tokens: int = 16384
    ) -> None:
        """Keep the numbers and where ordinary text comes from.

        Args:
            config: the method's numbers.
            background: ordinary text of the model, for the second moments of old keys.
            batch_tokens: at most so many tokens are run at once: memory, not results.
        """
        super().__init__(config, background)
        self.batch_tokens = batch_tokens
        self._contexts = Contexts(config.contexts, config.prefixes, seed=config.seed)

    def prepare(self, lm: LanguageModel, *, progress: Progress = silent) -> None:
        """Take of the model, as it is now, what all later edits need: contexts and moments.

        `edit` does so by itself. Call it where the first edit may find the model changed already.
        """
        self._run(lm, progress)

    def edit(
        self,
        lm: LanguageModel,
        requests: Sequence[Request],
        *,
        known: Mapping[Group, Target] | None = None,
        progress: Progress = silent,
    ) -> WeightEdit:
        """Compute the change; the model is bit for bit as before, whatever happens.

        Args:
            lm: the model.
            requests: what it is to say.
            known: targets that were found elsewhere, with `contexts`, for all `groups`.
            progress: called with (stage, done, total).

        Raises:
            RequestError: two requests contradict each other.
            TargetError: targets failed (all of them, with `keep_going`); they are named.
            SolveError: the equality constraint cannot be met, or the moments are singular.
            NotFiniteError: keys or weights are NaN or infinite.
            ConfigError: the model is not a decoder, or has no such layer; targets are known of
                other groups.
        """
        groups = self.groups(lm, requests)
        if known and (missing := [group for group in groups if group not in known]):
            raise ConfigError(
                f"the targets that are known lack {len(missing)} of {len(groups)} groups of "
                f"requests, {missing[0][0].text!r} first. Find them for all `groups`."
            )
        run = self._run(lm, progress)
        return self._edit(run, self._rounds(groups), known or {}, progress)

    def edit_each(
        self,
        lm: LanguageModel,
        batches: Sequence[Sequence[Request]],
        *,
        progress: Progress = silent,
    ) -> Iterator[WeightEdit | TargetError | SolveError]:
        """An edit of its own for each batch, as if it were the only one; in order.

        The same as `edit` for each, to rounding, but the targets of all batches are found in one
        batch first, and remembered if the background does so: the way to measure a method. A batch
        that fails gives its error instead of an edit.

        Raises:
            RequestError: two requests of one batch contradict each other.
            NotFiniteError: keys or weights are NaN or infinite.
        """
        batches = [unique(batch) for batch in batches]
        each = [self._rounds(self.groups(lm, batch)) for batch in batches]
        run = self._run(lm, progress)
        known = self._targets_of_all(run, batches, each, progress)
        for rounds in each:
            try:
                yield self._edit(run, rounds, known, silent)
            except (TargetError, SolveError) as error:
                yield error

    def groups(self, lm: LanguageModel, requests: Sequence[Request]) -> Groups:
        """Requests whose subjects end in the same tokens: they share one key, so also one target.

        A subject that noise hides has another key than the same subject in clear.

        Raises:
            RequestError: two requests contradict each other.
            ConfigError: the model is not a decoder.
        """
        lm.require_decoder(self.name.upper())
        requests = unique(requests)
        check_batch(requests, self.variants)
        groups: dict[tuple[tuple[int, ...], bool], list[Request]] = {}
        for row, request in zip(subject_rows(lm, requests), requests, strict=True):
            groups.setdefault((row, request.problem.hidden), []).append(request)
        return [tuple(group) for group in groups.values()]

    def _rounds(self, groups: Groups) -> list[Groups]:
        """What is written at once: all groups, or one after another but never one over another."""
        return [[group] for group in groups] if self.config.one_at_a_time else [groups]

    def _targets_of_all(
        self,
        run: _Run,
        batches: Sequence[Sequence[Request]],
        each: Sequence[Sequence[Groups]],
        progress: Progress,
    ) -> dict[Group, Target]:
        """The targets of each batch's first round: only that meets the model as it is now.

        Requests alone and those that share a subject are optimised apart, so that the targets of
        the former do not depend, in the last bits, on how requests are put into batches.
        """
        first = [group for rounds in each for group in rounds[0]]
        shared = list(dict.fromkeys(group for group in first if len(group) > 1))
        alone = [group for group in first if len(group) == 1]
        if not self.config.one_at_a_time:
            alone = [(request,) for batch in batches for request in batch]
        known: dict[Group, Target] = {}
        for groups in list(dict.fromkeys(alone)), shared:
            if groups:
                known |= run.remembered(groups, progress)
        return known

    def _edit(
        self,
        run: _Run,
        rounds: Sequence[Groups],
        known: Mapping[Group, Target],
        progress: Progress,
    ) -> WeightEdit:
        """Carry out the rounds; `known` are targets of groups of the first one."""
        changes: dict[int, list[LowRank]] = {layer: [] for layer in run.layers}
        written: list[Request] = []
        failures: list[str] = []
        with restored(run.lm, run.layers):
            for done, groups in enumerate(rounds):
                told = progress if len(rounds) == 1 else silent
                groups, targets, left_out = run.reached(groups, known if not done else {}, told)
                failures += left_out
                if groups:
                    for layer, change in run.write_(groups, targets, told):
                        changes[layer].append(change)
                    written += [request for group in groups for request in group]
                if len(rounds) > 1:
                    progress("requests", done + 1, len(rounds))
        if not written:
            raise TargetError("no request could be carried out:\n" + "\n".join(failures) + _ADVICE)
        return self._made(
            run, {layer: sum_of(parts) for layer, parts in changes.items()}, written, failures
        )

    def _run(self, lm: LanguageModel, progress: Progress) -> _Run:
        lm.require_decoder(self.name.upper())
        layers = self.layers(lm)
        paths = [lm.mlp_out_path(layer) for layer in layers]
        lm.check_editable(paths)
        lm.check_finite(paths)
        moments = self.background.moments(lm, layers, progress=progress)
        return _Run(
            lm,
            self.config,
            layers,
            self.contexts(lm),
            moments,
            self.background,
            self.batch_tokens,
        )

    def contexts(self, lm: LanguageModel) -> list[str]:
        """What stands before prompts: nothing at first, then given or random prefixes.

        Random ones are sampled once per model.
        """
        return self._contexts.of(lm)

    def _made(
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
    background: Background
    batch_tokens: int

    def remembered(self, groups: Groups, progress: Progress) -> dict[Group, Target]:
        """Each group's target, which the background may know from an earlier edit."""
        asked = (tuple(groups), tuple(self.contexts), self.layers[-1], self.config.target)
        found = self.background.targets(self.lm, asked, lambda: self.targets(groups, progress))
        return {group: found.one(i) for i, group in enumerate(groups)}

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

    def reached(
        self, groups: Groups, known: Mapping[Group, Target], progress: Progress
    ) -> tuple[Groups, Targets, list[str]]:
        """The groups whose target was reached, their targets, and a line on each of the others.

        Raises:
            TargetError: a target was not reached, and the config does not say `keep_going`.
        """
        if known:
            targets = Targets.of([known[group] for group in groups])
        else:
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
            factor = self.moments[layer].factor(layer, keys.device)
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
        veils = [
            subject_veils(self.lm, heads, prefix, draw=draw)
            for draw, prefix in enumerate(self.contexts)
        ]
        seen = at_subject(self.lm, rows, layer, batch_tokens=self.batch_tokens, veils=veils)
        weights = context_weights(self.config.averaging, len(self.contexts)).to(seen.keys)
        keys = torch.einsum("p,npd->nd", weights, seen.keys)
        deltas = targets.deltas.to(keys)
        if self.config.target.place == "mlp" and len(self.layers) == 1:
            if self.config.value_at == "averaged":  # v* minus what is said at the averaged key
                said = torch.einsum("p,npd->nd", weights, seen.values)
                return keys, deltas + seen.values[:, 0] - said
            # The original mixture: delta is what D adds at the bare key.
            detectors = self.moments[layer].factor(layer, keys.device).whiten(keys)
            bare = (detectors * seen.keys[:, 0]).sum(dim=1)
            return keys, deltas * ((detectors * keys).sum(dim=1) / bare)[:, None]
        now = stream_at_subject(
            self.lm, rows[0], last, batch_tokens=self.batch_tokens, veils=veils[0]
        )
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
