"""Fine-tuning: FT, FT+L and FT+KL, the baselines of every editing paper.

Adam lowers the mean loss of the answers,

    L = mean over requests of -log p(target | prompt), per token of the target,

by changing a few matrices alone, until L is small or the updates are used up. Three ways:

- FT: no more than that;
- FT+L: after each update every weight is put back to within eps of where it began, the largest
  norm ||W - W0||_inf <= eps (Zhu et al. 2020, arXiv:2012.00363; the baseline of ROME's authors);
- FT+KL: L + weight * KL(before || after) on the texts most similar to the requests (`locality.py`).

Requests of other variants have other losses (`asked.py`); where one of them has no point at which
it is reached, all updates are used.

The reference code of FT scores all tokens of a target at the prompt's last position, without ever
feeding them; `loss = "last-position"` does the same. It also trains the layer's bias, which an edit
of matrices cannot hold: here it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from errata.editors.background import Background
from errata.editors.config import EditorConfig
from errata.editors.difference import Borrowed, borrowed, factors
from errata.editors.editor import Editor
from errata.editors.tuning.asked import Asked, Scored, asked_losses, asked_of
from errata.editors.tuning.locality import Held, LocalityConfig, Pool
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.errors import NotFiniteError
from errata.lm.forward import Replay
from errata.lm.load import LanguageModel
from errata.lm.loss import example_batches
from errata.progress import Progress, silent
from errata.requests import VARIANTS, Request, check_batch, unique

Matrices = Literal["mlp_out", "mlp_in", "mlp_in+mlp_out"]


@dataclass(frozen=True)
class FineTuneConfig(EditorConfig):
    """Numbers of fine-tuning; FT+L and FT+KL have other defaults."""

    layers: tuple[int, ...] = ()
    """Blocks whose MLPs are trained, ascending. Empty: the method's usual place, as a share of the
    depth."""
    seed: int = 0
    """Kept in the record; fine-tuning draws nothing at random."""
    matrices: Matrices = "mlp_out"
    """Which matrices of these MLPs: the last, the first, or both."""
    updates: int = 25
    """At most so many updates."""
    learning_rate: float = 0.01
    """Of Adam; in `relative` units a multiple of the matrix's root-mean-square entry."""
    weight_decay: float = 0.0
    """Adam's pull of the weights towards zero."""
    stop_below: float = 0.01
    """Training ends once the mean loss of the answers, in nats a token, is below this."""
    norm_limit: float | None = None
    """How far any weight may move (FT+L), in the same units as the learning rate; None: freely."""
    units: Literal["relative", "absolute"] = "relative"
    """What `learning_rate` and `norm_limit` are measured in; the papers' numbers are `absolute`."""
    loss: Scored = "answer"
    """What is lowered: the loss of the whole answer, token after token; or, as in the reference
    code, that of all its tokens at the prompt's last position (decoders only)."""
    rank: int | None = None
    """Keep each matrix's change as its best approximation of this rank; None keeps all of it."""
    kl: LocalityConfig = field(default_factory=LocalityConfig)

    def __post_init__(self) -> None:
        """Refuse numbers without sense."""
        super().__post_init__()
        self._at_least_one("updates")
        self._positive("learning_rate")
        self._not_negative("weight_decay")
        self._require(
            self.norm_limit is None or self.norm_limit > 0,
            f"norm_limit must be positive, or None for no limit, got {self.norm_limit}.",
        )
        self._require(
            self.rank is None or self.rank >= 1,
            f"rank must be at least 1, or None for the whole change, got {self.rank}.",
        )


class FineTune(Editor):
    """Fine-tuning of some matrices; FT+L and FT+KL are its subclasses by config."""

    name = "ft"
    depth = (21 / 28, 21 / 28)  # the reference's GPT-J layer
    variants: ClassVar[frozenset[str]] = frozenset(VARIANTS)
    config: FineTuneConfig

    def __init__(
        self, config: FineTuneConfig, background: Background, *, batch_tokens: int = 16384
    ) -> None:
        """Keep the numbers and where similar texts come from.

        Args:
            config: the method's numbers.
            background: ordinary text of the model, to hold on to.
            batch_tokens: at most so many tokens are run at once: memory, not results.
        """
        super().__init__(config, background)
        self.batch_tokens = batch_tokens
        self._pools: WeakKeyDictionary[PreTrainedModel, Pool] = WeakKeyDictionary()

    def prepare(self, lm: LanguageModel, *, progress: Progress = silent) -> None:
        """Look at the numbers and, with a KL term, at all texts that may be held on to."""
        self.layers(lm)
        if self.config.loss == "last-position":
            lm.require_decoder("loss = 'last-position'")
        if self.config.kl.weight and lm.network not in self._pools:
            progress("texts to hold on to", 0, 1)
            self._pools[lm.network] = Pool.of(lm, self.background, self.config.kl)
            progress("texts to hold on to", 1, 1)

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> WeightEdit:
        """Train all requests as one batch; the model is bit for bit as before, whatever happens.

        Whether each target was reached is not asked: the notes tell each request's loss.

        Args:
            lm: the model.
            requests: what it is to say.
            progress: called with (stage, done, total).

        Raises:
            ConfigError: the model has no such layer, or the loss is not for its kind or for the
                requests' variants.
            RequestError: there is no request, or two contradict each other.
            NotFiniteError: the model, or the training, gives NaN or infinity.
            TokenizationError: a prompt or target has no token of its own, or is too long.
        """
        requests = unique(requests)
        check_batch(requests, self.variants)
        self.prepare(lm, progress=progress)
        pool = self._pools.get(lm.network)
        held = pool.nearest(lm, requests) if pool else []
        with borrowed(lm, self._paths(lm)) as loan:
            training = _Training.of(
                loan,
                self.config,
                min(self.layers(lm)),
                asked_of(lm, requests, self.config.loss),
                [pool.rows[number] for number in held] if pool else [],
                self.batch_tokens,
            )
            updates, first = training.run(progress)
            last = training.each()
            moved = loan.moved()
        found = {path: factors(change, self.config.rank) for path, change in moved.items()}
        notes = {
            "left out": [],
            "updates": updates,
            "loss before": first,
            "loss after": last,
            "largest change": {path: change.abs().max() for path, change in moved.items()},
            "error of the rank": {path: missed for path, (_, missed) in found.items()},
            "held on to": [pool.texts[number] for number in held] if pool else [],
        }
        config = self.config.to_dict() | {"layers": self.layers(lm)}
        return WeightEdit.of(
            lm,
            {path: change.to(dtype=torch.float32) for path, (change, _) in found.items()},
            requests=requests,
            record=Record.of(
                lm, method=self.name, config=config, seed=self.config.seed, notes=notes
            ),
        )

    def _paths(self, lm: LanguageModel) -> list[str]:
        places = {"mlp_in": lm.mlp_in_path, "mlp_out": lm.mlp_out_path}
        return [
            places[name](layer)
            for layer in self.layers(lm)
            for name in self.config.matrices.split("+")
        ]


@dataclass(frozen=True)
class FineTuneLimitedConfig(FineTuneConfig):
    """FT+L: the first block, no weight far from where it began."""

    norm_limit: float | None = 0.01


class FineTuneLimited(FineTune):
    """Fine-tuning under a limit on the largest change of any weight."""

    name = "ft-l"
    depth = (0.0, 0.0)  # the reference's layer in every model


@dataclass(frozen=True)
class FineTuneKLConfig(FineTuneConfig):
    """FT+KL: what similar texts say counts as much as the edits."""

    kl: LocalityConfig = field(default_factory=lambda: LocalityConfig(weight=1.0))


class FineTuneKL(FineTune):
    """Fine-tuning that holds on to what the most similar texts say."""

    name = "ft-kl"


@dataclass(frozen=True)
class _Training:
    """One batch's training on borrowed weights."""

    loan: Borrowed
    config: FineTuneConfig
    batches: list[tuple[list[Asked], Replay]]
    """What is asked in one pass, and what the blocks below the trained ones say to it."""
    held: Held

    @classmethod
    def of(
        cls,
        loan: Borrowed,
        config: FineTuneConfig,
        layer: int,
        asked: Sequence[Asked],
        rows: Sequence[Sequence[int]],
        batch_tokens: int,
    ) -> Self:
        """Ask once, and keep what will not change.

        Args:
            loan: the weights.
            config: the numbers.
            layer: the lowest block that is trained.
            asked: what the model should say.
            rows: token ids of the texts that are held on to.
            batch_tokens: at most so many, padding included, in one pass.
        """
        lm = loan.lm
        grouped = example_batches(lm, [one.example for one in asked], batch_tokens)
        some = [[asked[i] for i in group] for group in grouped]
        below = [Replay.of(lm, layer, partial(asked_losses, lm, s, config.loss)) for s in some]
        return cls(loan, config, list(zip(some, below, strict=True)), Held.of(loan, rows, layer))

    def run(self, progress: Progress) -> tuple[int, float]:
        """Train; how many updates it took, and the mean loss before the first.

        Raises:
            NotFiniteError: the loss is NaN or infinite.
        """
        scales = [self._scale(own) for own in self.loan.own]
        adam = torch.optim.Adam(
            [
                {"params": [copy], "lr": self.config.learning_rate * scale}
                for copy, scale in zip(self.loan.copies, scales, strict=True)
            ],
            weight_decay=self.config.weight_decay,
        )
        open_ended = any(one.request.problem.open_ended for some, _ in self.batches for one in some)
        first = 0.0
        for done in range(self.config.updates):
            loss = self._descend(done)
            first = first if done else loss
            if loss < self.config.stop_below and not open_ended:
                return done, first
            adam.step()
            adam.zero_grad()
            self._limit(scales)
            self.loan.show_()
            progress("updates", done + 1, self.config.updates)
        return self.config.updates, first

    @torch.no_grad()
    def each(self) -> list[float]:
        """Each request's loss on the weights as they are now.

        Raises:
            NotFiniteError: one is NaN or infinite.
        """
        found = torch.zeros(self._requests, dtype=torch.float64)
        for group, each in self._losses():
            for one, loss in zip(group, each.tolist(), strict=True):
                found[one.number] += one.share * loss
        self._check(float(found.sum()), self.config.updates)
        return found.tolist()

    @property
    def _requests(self) -> int:
        return 1 + max(one.number for some, _ in self.batches for one in some)

    def _descend(self, done: int) -> float:
        """The requests' mean loss; its gradient and KL's are left on the copies."""
        loss = 0.0
        for group, each in self._losses():
            shares = each.new_tensor([one.share for one in group])
            share = (shares * each).sum() / self._requests
            loss += float(share.detach())
            self._add(share)
        for share in self.held.divergences():
            self._add(self.config.kl.weight * share)
        self._check(loss, done)
        return loss

    def _losses(self) -> Iterable[tuple[list[Asked], Tensor]]:
        """Batch by batch: what is asked, and the loss of each."""
        for some, below in self.batches:
            with below.told():
                each = asked_losses(self.loan.lm, some, self.config.loss)
            yield some, each

    def _add(self, loss: Tensor) -> None:
        """Add the loss' gradient to that of the copies."""
        slopes = torch.autograd.grad(loss, self.loan.parameters)
        for copy, slope in zip(self.loan.copies, slopes, strict=True):
            slope = slope.to(copy.dtype)
            copy.grad = slope if copy.grad is None else copy.grad + slope

    @torch.no_grad()
    def _limit(self, scales: Sequence[float]) -> None:
        """FT+L: put every weight back to within the limit."""
        if self.config.norm_limit is None:
            return
        for copy, own, scale in zip(self.loan.copies, self.loan.own, scales, strict=True):
            eps, start = self.config.norm_limit * scale, own.to(copy.dtype)
            copy.copy_(copy.clamp(start - eps, start + eps))

    def _scale(self, weight: Tensor) -> float:
        """What one unit of the learning rate and the limit is, for this matrix."""
        return (
            1.0 if self.config.units == "absolute" else float(weight.float().square().mean().sqrt())
        )

    def _check(self, loss: float, done: int) -> None:
        if torch.tensor(loss).isfinite():
            return
        lm = self.loan.lm
        if not done:
            lm.check_finite()
            raise NotFiniteError(
                f"the answers' loss is not finite: the dtype of {lm.name} overflows (try float32 "
                "or bfloat16)."
            )
        raise NotFiniteError(
            f"fine-tuning left all bounds after {done} updates: the loss is not finite. Lower "
            f"learning_rate, which is {self.config.learning_rate}."
        )
