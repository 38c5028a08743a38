"""Targets: what the edited layer should say at the subject so that the model gives the new answer.

One vector delta per subject is added to the MLP's output (ROME's v*, Meng et al. 2022, equation 4)
or to the block's output (MEMIT's z, Meng et al. 2023, equation 16) at the subject's last token, and
optimised by Adam to make the target likely after the bare prompt and after random prefixes:

    loss = mean over prompts of  -log p(target) / len(target)
           + kl * KL( p("{subject} is a") with delta || without )  + decay of |delta|

Of what is to be said less (fact erasure) exp(-NLL) takes the first term's place; that and what has
no goal but more (amplification) use all updates. Where noise hides a subject (fact forcing), each
row has a draw of its own.

All requests are optimised in one batch, each with its own delta and its own end. What delta cannot
change is computed once: all blocks up to the edited one, and all tokens before the subject's end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from errata.editors.closed_form.keys import at_subject, stream_at_subject
from errata.editors.closed_form.target_rows import Plan, TargetRows, bare_rows, rows_of
from errata.editors.config import Config
from errata.lm.forward import Paused, frozen, pause
from errata.lm.hooks import rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.noise import subjects_hidden
from errata.progress import Progress, silent
from errata.requests import Request

logger = logging.getLogger(__name__)

_ENOUGH = 256
"""Tokens that keep a processor busy: from here on, rows of other lengths go into another batch
rather than be padded."""


@dataclass(frozen=True)
class TargetConfig(Config):
    """Numbers of the target optimisation.

    Numbers in `relative` units transfer between models: they are multiples of the residual stream's
    norm |h| at the subject. In `absolute` units they are the papers' own, tuned model by model.
    """

    place: Literal["mlp", "block"] = "block"
    """Where delta is added: the MLP's output (ROME) or the block's output (MEMIT)."""
    updates: int = 40
    """Adam updates at most. The reference code counts one more step than it updates."""
    units: Literal["relative", "absolute"] = "relative"
    """What `learning_rate`, `clamp` and `decay` are measured in."""
    learning_rate: float = 0.05
    """Relative: length of Adam's first update in |h|. Absolute: Adam's rate (papers: 0.5)."""
    clamp: float = 1.5
    """Longest delta, in |h|; absolute: in the norm of the original value at `place`."""
    decay: float = 0.0
    """Weight of (|delta| / |h|)^2; absolute: of |delta| / |value|^2 (the reference code's)."""
    kl: float = 0.0625
    """Weight of the divergence on "{subject} is a"."""
    stop_below: float = 0.1
    """A request whose loss falls below this is done (papers: 0.05)."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        self._at_least_one("updates")
        self._positive("learning_rate", "clamp")
        self._not_negative("decay", "kl", "stop_below")


@dataclass(frozen=True)
class Targets:
    """What was found for n subjects."""

    deltas: Tensor
    """(n, d_model) float64, to be added at the subject."""
    streams: Tensor
    """(n, d_model) float64, the block's output there before; `streams + deltas` is MEMIT's z."""
    loss: Tensor
    """(n,) the last loss of each."""
    failed: dict[int, str]
    """Why a subject's target did not reach its goal, by index."""

    def only(self, keep: Sequence[int]) -> Targets:
        """The targets of these subjects, none of which may have failed."""
        chosen = list(keep)
        return Targets(self.deltas[chosen], self.streams[chosen], self.loss[chosen], {})

    def one(self, i: int) -> Target:
        """What was found for the i-th subject."""
        return Target(self.deltas[i], self.streams[i], self.loss[i], self.failed.get(i))

    @classmethod
    def of(cls, found: Sequence[Target]) -> Self:
        """What `one` took apart."""
        deltas, streams, loss, why = zip(*found, strict=True)
        failed = {i: reason for i, reason in enumerate(why) if reason}
        return cls(torch.stack(deltas), torch.stack(streams), torch.stack(loss), failed)


class Target(NamedTuple):
    """What was found for one subject: see `Targets`."""

    delta: Tensor
    stream: Tensor
    loss: Tensor
    failed: str | None


def optimise_targets(
    lm: LanguageModel,
    groups: Sequence[Sequence[Request]],
    prefixes: Sequence[str],
    layer: int,
    config: TargetConfig,
    *,
    batch_tokens: int,
    progress: Progress = silent,
) -> Targets:
    """One target for each group of requests that share a subject's key.

    Args:
        lm: the model; its weights are only read.
        groups: n groups; the requests of a group share one delta.
        prefixes: contexts that stand before each prompt, the empty one among them.
        layer: the block at whose MLP or output delta is added.
        config: the numbers.
        batch_tokens: at most so many tokens (padding included) are optimised at once.
        progress: told how many groups are done.

    Single failures are told in the result; nothing is raised for them.
    """
    rows = [rows_of(lm, [group], prefixes) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (rows[i].remaining, rows[i].width))
    results = [Target(torch.empty(0), torch.empty(0), torch.empty(0), None)] * len(groups)
    chunk: list[int] = []
    done = 0

    def run() -> None:
        nonlocal done
        part = _optimise(
            lm,
            rows_of(lm, [groups[i] for i in chunk], prefixes),
            len(chunk),
            layer,
            config,
            batch_tokens,
        )
        for place, i in enumerate(chunk):
            results[i] = part.one(place)
        done += len(chunk)
        progress("targets", done, len(groups))
        chunk.clear()

    progress("targets", 0, len(groups))
    for i in order:
        held = sum(len(rows[j].ids) for j in chunk)
        width = max(rows[j].width for j in [*chunk, i])
        full = (held + len(rows[i].ids)) * width > batch_tokens
        before = rows[chunk[-1]].remaining if chunk else 0
        longer = rows[i].remaining > before and held * before >= _ENOUGH
        if chunk and (full or longer):
            run()
        chunk.append(i)
    run()
    return Targets.of(results)


def _optimise(
    lm: LanguageModel, rows: TargetRows, n: int, layer: int, config: TargetConfig, batch_tokens: int
) -> Targets:
    """All deltas of one micro-batch."""
    device = lm.device
    inside = config.place == "mlp" and not lm.anatomy.additive
    below = layer - 1 if inside else layer
    with subjects_hidden(lm, rows.veils):
        paused = pause(lm, rows.ids, rows.starts, below)
    with subjects_hidden(lm, rows.kl_veils):
        paused_kl = pause(lm, rows.kl_ids, [len(ids) - 1 for ids in rows.kl_ids], below)
    first = bare_rows(rows, n)
    bare = [rows.ids[i][: rows.starts[i] + 1] for i in first]
    veils = [rows.veils[i] for i in first]
    streams = stream_at_subject(lm, bare, layer, batch_tokens=batch_tokens, veils=veils).to(device)
    if config.units == "absolute" and config.place == "mlp":
        seen = at_subject(lm, [bare], layer, batch_tokens=batch_tokens, veils=[veils])
        own = seen.values[:, 0].to(device)
    else:
        own = streams
    limits = _Limits.of(own, config)
    deltas = [torch.zeros(lm.d_model, device=device, requires_grad=True) for _ in range(n)]
    adam = torch.optim.Adam(
        [{"params": [d], "lr": float(rate)} for d, rate in zip(deltas, limits.rates, strict=True)]
    )
    first_said = torch.full((n,), float("nan"), device=device)
    last_said, last_loss = first_said.clone(), first_said.clone()
    open_ended = rows.open_ended.to(device)
    before: Tensor | None = None
    active = torch.arange(n)
    plan = Plan.of(rows, active, n, device)
    with frozen(lm):
        for update in range(config.updates + 1):
            chosen = torch.stack([deltas[i] for i in active.tolist()])
            shifted = _Shifted(lm, layer, inside, chosen)
            logits = shifted(paused, plan.select, plan.owner, plan.row, plan.column)
            here = active.to(device)
            said = plan.losses(logits).to(device)
            alone, column = torch.arange(len(active)), torch.zeros_like(active)
            log_p = shifted(paused_kl, plan.kl_select, alone.to(device), alone, column)
            log_p = log_p.float().log_softmax(dim=1).to(device)
            if before is None:
                before = log_p.detach()
            known = before[here]
            kl = config.kl * (log_p.exp() * (log_p - known)).sum(dim=1)
            loss = said + kl + limits.decay(chosen, here)
            last_said[here], last_loss[here] = said.detach(), loss.detach()
            if update == 0:
                first_said[here] = said.detach()
            reached = (loss.detach() < config.stop_below) & ~open_ended[here]
            going = loss.detach().isfinite() & ~reached
            if update == config.updates or not going.any():
                break
            adam.zero_grad(set_to_none=True)
            torch.autograd.backward(loss[going].sum())
            for i, moving in zip(active.tolist(), going.tolist(), strict=True):
                if not moving:
                    deltas[i].grad = None  # Adam passes over it: this target is done
            adam.step()
            for i in active[going.cpu()].tolist():
                limits.clamp_(deltas[i], i)
            if not going.all():
                active = active[going.cpu()]
                plan = Plan.of(rows, active, n, device)
    found = torch.stack([delta.detach() for delta in deltas]).double()
    less = rows.less[first].tolist()
    failed = {
        i: why
        for i in range(n)
        if (why := _failure(found[i], less[i], first_said[i], last_said[i], last_loss[i], config))
    }
    return Targets(found, streams, last_loss, failed)


@dataclass(frozen=True)
class _Limits:
    """What holds n deltas back, each measured by the vector that it is added to."""

    rates: Tensor
    """(n,) Adam's learning rates."""
    radius: Tensor
    """(n,) how long a delta may become."""
    cost: Tensor
    """(n,) of a delta of length 1."""
    squared: bool
    """Whether its length counts squared."""

    @classmethod
    def of(cls, own: Tensor, config: TargetConfig) -> Self:
        """Of deltas that are added to the vectors (n, d)."""
        norm = own.norm(dim=1).float().clamp(min=1e-12)
        relative = config.units == "relative"
        rates = (
            norm * (config.learning_rate / own.shape[1] ** 0.5)  # Adam first moves rate * sqrt(d)
            if relative
            else torch.full_like(norm, config.learning_rate)
        )
        return cls(rates, config.clamp * norm, config.decay / norm.square(), relative)

    def decay(self, deltas: Tensor, which: Tensor) -> Tensor:
        """(m,) what the length of m of the deltas costs."""
        size: Tensor = deltas.norm(dim=1)
        return self.cost[which] * (size.square() if self.squared else size)

    @torch.no_grad()
    def clamp_(self, delta: Tensor, i: int) -> None:
        """Shorten the i-th delta to its radius, if it is longer."""
        length = delta.norm()
        if length > self.radius[i]:
            delta.mul_(self.radius[i] / length)


def _failure(
    delta: Tensor, less: bool, first_said: Tensor, said: Tensor, loss: Tensor, config: TargetConfig
) -> str:
    """Why a search came to nothing; empty if it did not.

    Args:
        delta: what it found.
        less: whether the request lowers a probability, which is then what is told.
        first_said: the answer's loss at first.
        said: and at last.
        loss: all that was minimised, at last.
        config: says below what it need not move.
    """
    if not (loss.isfinite() and delta.isfinite().all()):
        return "its loss became NaN or infinite"
    if (less or loss >= config.stop_below) and said > 0.999 * first_said:
        unit = "probability" if less else "nats a token"
        return f"its loss did not move ({first_said:.2f} {unit} before, {said:.2f} after)"
    return ""


@dataclass
class _Shifted:
    """The model with each delta added at its rows' first remaining token, the subject's last."""

    lm: LanguageModel
    layer: int
    inside: bool
    deltas: Tensor

    def __call__(
        self, paused: Paused, select: Tensor | None, owner: Tensor, row: Tensor, column: Tensor
    ) -> Tensor:
        """Logits (m, vocab) at (row, column) of the selected rows, delta `owner[i]` on the i-th."""
        states = paused.states
        if select is not None:
            states = states[select.to(states.device)]

        def shifted(hidden: Tensor) -> Tensor:
            head = hidden[:, :1] + self.deltas[owner][:, None].to(hidden)
            return torch.cat([head, hidden[:, 1:]], dim=1)

        if self.inside:
            with rewritten_output(self.lm.mlp(self.layer), shifted):
                return paused.resume(states, row, column, select)
        return paused.resume(shifted(states), row, column, select)


def describe_failures(failed: dict[int, str], groups: Sequence[Sequence[Request]]) -> str:
    """One line for each failed target: its prompt, its target, and why."""
    return "\n".join(
        f"  {request.text!r} -> {request.target.strip()!r}: {failed[i]}"
        for i in sorted(failed)
        for request in groups[i]
    )
