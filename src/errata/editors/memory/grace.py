"""GRACE: a codebook beside one layer, whose keys answer within a radius that is deferred to.

Hartvigsen et al. 2023, arXiv:2211.11031. The key of an edit is the layer's input at the prompt's
last token. Its value takes the place of the layer's output there and is trained through the model
alone, by Adam on the loss of the answer,

    v = argmin over v of -log p(target | prompt, the layer's output := v).

How keys are added, split and covered is the codebook's own rule (`errata.edits.memories.codebook`).
No weight is ever trained or changed; what is no nearer to a key than its radius is answered by the
model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.editors.config import EditorConfig
from errata.editors.editor import Editor
from errata.edits.edit import Record
from errata.edits.memories.codebook import Codebook, Replace, replaced
from errata.edits.memory import MemoryEdit, memory_at, set_aside
from errata.errors import ConfigError, NotFiniteError
from errata.lm.forward import Replay, frozen
from errata.lm.hooks import attached
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, example_batches
from errata.lm.prompts import current
from errata.progress import Progress, silent
from errata.requests import Request, check_batch, unique

KIND = "codebook"


@dataclass(frozen=True)
class GraceConfig(EditorConfig):
    """Numbers of GRACE."""

    layers: tuple[int, ...] = ()
    """The one block beside which the codebook sits. Empty: the method's usual place, as a share of
    the depth (of the encoder where there is one)."""
    matrix: Literal["mlp_in", "mlp_out"] = "mlp_out"
    """Beside which matrix of the block's MLP; the authors' GPT2-XL has it at the first, their T5
    and BERT at the last."""
    radius: float = 0.25
    """With which radius a key begins (eps); in `relative` units a share of the key's own length."""
    units: Literal["relative", "absolute"] = "relative"
    """What `radius` is measured in; the papers' numbers are `absolute`."""
    replace: Replace = "last"
    """Which tokens' output a value replaces: the prompt's "last", all of the "prompt", the tokens
    "before" its last (what the reference code's replace_prompt does), or "all" of the row."""
    start: Literal["cold", "warm"] = "cold"
    """Where a value begins: at random in [0, 1), or at the layer's own output."""
    updates: int = 100
    """At most so many updates of a value (n_iter)."""
    learning_rate: float = 1.0
    """Of Adam, for a value's entries (the authors' own)."""
    stop_below: float = 0.01
    """A value is done once its answer's loss, in nats a token, is below this; 0 for all updates."""
    seed: int = 0
    """Of cold starts."""

    def __post_init__(self) -> None:
        """Refuse numbers without sense."""
        super().__post_init__()
        self._positive("radius", "learning_rate")
        self._at_least_one("updates")
        self._not_negative("stop_below")


class Grace(Editor):
    """One key and one value for each request."""

    name = "grace"
    depth = (35 / 48, 35 / 48)  # the authors' layer of GPT2-XL
    config: GraceConfig

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The one block beside which the codebook sits.

        Raises:
            ConfigError: there are several, or it is beyond the model's depth.
        """
        if not self.config.layers:
            return (round(self.depth[0] * (len(lm.reading) - 1)),)
        if len(self.config.layers) > 1:
            raise ConfigError(f"a codebook sits beside one layer, not {self.config.layers}.")
        return super().layers(lm)

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> MemoryEdit:
        """Find a key and train a value for each request, all in one batch, none knowing the others.

        The notes tell, under `wrong still`, whose answer is not yet the likeliest one.

        Args:
            lm: the model; what is in its codebook already does not disturb the training.
            requests: what it is to say.
            progress: called with (stage, done, total).

        Raises:
            ConfigError: the model has no such layer.
            RequestError: there is no request, or two contradict each other.
            NotFiniteError: the model, or the training, gives NaN or infinity.
            TokenizationError: a prompt or target has no token of its own, or is too long.
        """
        requests = unique(requests)
        check_batch(requests)
        (layer,) = self.layers(lm)
        places = {"mlp_in": lm.mlp_in_path, "mlp_out": lm.mlp_out_path}
        path, settings = places[self.config.matrix](layer), {"replace": self.config.replace}
        lm.check_editable([path])
        book = memory_at(lm, KIND, path, settings)
        assert book is None or isinstance(book, Codebook)
        examples = [Example(request.text, request.target) for request in requests]
        trained: list[_Trained] = []
        order: list[int] = []
        with frozen(lm), set_aside(lm, KIND, path):
            for group in example_batches(lm, examples, _BATCH_TOKENS):
                some = [requests[i] for i in group]
                training = _Training(lm, layer, path, self.config, [examples[i] for i in group])
                trained.append(training.run(training.begin(some, book), progress))
                order += group
        back = torch.tensor(order).argsort()
        keys, values, losses, right = (
            torch.cat([getattr(one, name) for one in trained])[back].cpu()
            for name in ("keys", "values", "losses", "right")
        )
        radii = torch.full((len(keys),), self.config.radius)
        if self.config.units == "relative":
            radii = radii * keys.norm(dim=1)
        notes = {
            "left out": [],
            "loss after": losses,
            "wrong still": [r.text for r, ok in zip(requests, right, strict=True) if not ok],
        }
        config = self.config.to_dict() | {"layers": (layer,)}
        return MemoryEdit.of(
            lm,
            KIND,
            path,
            {"keys": keys, "values": values, "radii": radii},
            requests=requests,
            settings=settings,
            record=Record.of(
                lm, method=self.name, config=config, seed=self.config.seed, notes=notes
            ),
        )


_BATCH_TOKENS = 4096
"""Tokens, padding included, that are run at once."""


@dataclass(frozen=True)
class _Trained:
    keys: Tensor
    """(n, d_in)"""
    values: Tensor
    """(n, d_out)"""
    losses: Tensor
    """(n,) of the answers, in nats a token."""
    right: Tensor
    """(n,) whether the answer is the likeliest one."""


class _Training:
    """One batch of values, each trained on its own example."""

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        path: str,
        config: GraceConfig,
        examples: Sequence[Example],
    ) -> None:
        self.lm, self.path, self.config, self.examples = lm, path, config, examples
        self.module = lm.module(path)
        with attached(self.module, self._look):
            self.below = Replay.of(lm, layer, lambda: answer_logits(lm, examples))

    def _look(self, states: Tensor, output: Tensor) -> Tensor:
        """Keep what goes in and comes out at each prompt's last token."""
        prompts = current(self.lm, self.path)
        if prompts.start == 0:
            at = torch.arange(len(states)), prompts.ends
            wide = torch.promote_types(output.dtype, torch.float32)
            self.keys, self.own = states[at].to(wide), output[at].to(wide)
        return output

    def begin(self, requests: Sequence[Request], book: Codebook | None) -> Tensor:
        """(n, d_out) where the values begin: within a key's reach, at its value."""
        if self.config.start == "warm":
            values = self.own.clone()
        else:
            generator = torch.Generator().manual_seed(self.config.seed)
            values = torch.rand(1, self.own.shape[1], generator=generator)
            values = values.expand(len(self.own), -1).to(self.own, copy=True)
        if book is not None:
            distance, j = book.nearest(self.keys)
            for i, request in enumerate(requests):
                near = float(distance[i]) <= float(book.radii[j[i]])
                if near and book.labels[int(j[i])] == request.target.strip():
                    values[i] = book.values[j[i]]
        return values

    def run(self, start: Tensor, progress: Progress) -> _Trained:
        """Train the values; of each the best one counts, and no row depends on another.

        Raises:
            NotFiniteError: a loss is NaN or infinite.
        """
        values = start.clone().requires_grad_(True)
        adam = torch.optim.Adam([values], lr=self.config.learning_rate)
        best = start.clone()
        lowest = torch.full((len(start),), float("inf"), device=start.device)
        right = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        done = torch.zeros_like(right)
        for update in range(self.config.updates + 1):
            rewritten = attached(self.module, lambda _, output: self._replaced(output, values))
            with self.below.told(), rewritten:
                answers = answer_logits(self.lm, self.examples)
                losses = answers.losses()
            self._check(losses.detach(), update)
            now, ok = losses.detach().to(lowest), answers.right().to(right.device)
            better = ~done & (now < lowest)
            best[better], lowest[better] = values.detach()[better], now[better]
            right[better] = ok[better]
            done |= lowest < self.config.stop_below
            progress("values", update, self.config.updates)
            if done.all() or update == self.config.updates:
                break
            (values.grad,) = torch.autograd.grad(losses.sum(), [values])
            adam.step()
        return _Trained(self.keys, best, lowest, right)

    def _replaced(self, output: Tensor, values: Tensor) -> Tensor:
        prompts = current(self.lm, self.path)
        chosen = replaced(self.config.replace, prompts, output.shape[1])[..., None]
        return torch.where(chosen.to(output.device), values[:, None].to(output.dtype), output)

    def _check(self, losses: Tensor, update: int) -> None:
        if losses.isfinite().all():
            return
        self.lm.check_finite()
        after = f" after {update} updates of the values" if update else ""
        raise NotFiniteError(
            f"the answers' loss is not finite{after}: the dtype of {self.lm.name} overflows (try "
            "float32 or bfloat16), or learning_rate is too high."
        )
