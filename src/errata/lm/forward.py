"""Forward passes that compute only what is needed, in any family, through its own forward.

`logits_at` computes logits only where they are scored, `run_until` what rows begin with only once,
`Replay` what blocks below those that change say only once.
`record` runs a pass once and `Recorded.paused` stops it where one likes; `resume` then recomputes,
as often as wanted, only the tokens from a given position on in the blocks above a given one: the
blocks below stand aside, the tokens before are a key-value cache. `pause` is both for one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from errata.errors import TokenizationError
from errata.lm.hooks import (
    captured,
    computed_at,
    gathered_input,
    replaced_forward,
    stopped_after,
)
from errata.lm.load import LanguageModel
from errata.lm.prompts import asked
from errata.lm.tokens import Batch, pad


def logits_at(
    lm: LanguageModel,
    batch: Batch,
    rows: Tensor,
    columns: Tensor,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """Logits (m, vocab) at m positions (row, column) of a right-padded batch.

    An encoder-decoder has no logits there: its answer is a text of its own (see `loss`).

    Args:
        lm: the model.
        batch: n rows of tokens.
        rows: (m,) rows.
        columns: (m,) columns.
        ends: the column of each row's last prompt token. None says nothing of prompts: for passes
            that look into a model, which one with a memory on it refuses (`errata.lm.prompts`).

    Raises:
        HookError: nothing is said of prompts, and a memory on the model asks for them.
    """
    assert lm.kind != "encoder-decoder"
    known = nullcontext() if ends is None else asked(lm, ends)
    with known, gathered_input(lm.head, rows, columns):
        logits = lm.network(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


@torch.no_grad()
def run_until(
    lm: LanguageModel, rows: Sequence[Sequence[int]], module: nn.Module, *, share: bool = True
) -> int:
    """Run rows of token ids as far as `module`; what they all begin with is computed once.

    Args:
        lm: the model.
        rows: n rows of token ids.
        module: where the pass ends.
        share: False to run every row whole, where equal tokens do not mean equal states.

    Returns:
        How many leading tokens the last pass left out, as its rows share them; at least one token
        of each row is run. Column c of what hooks see is token c + that number.

    Raises:
        ConfigError: the model is not a decoder: what a row begins with depends on all of it.
    """
    lm.require_decoder("running shared beginnings once")
    shared = min(map(len, rows)) - 1 if len(rows) > 1 and share else 0
    while any(row[:shared] != rows[0][:shared] for row in rows):
        shared -= 1
    batch = pad(lm, [row[shared:] for row in rows])
    mask, cache = batch.mask, None
    if shared:
        cache = DynamicCache(config=lm.config)
        prefix = pad(lm, [rows[0][:shared]])
        with stopped_after(module):
            lm.network(
                input_ids=prefix.ids,
                attention_mask=prefix.mask,
                past_key_values=cache,
                use_cache=True,
            )
        cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([prefix.mask.expand(len(rows), -1), mask], dim=1)
    with stopped_after(module):
        lm.network(
            input_ids=batch.ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=shared > 0,
        )
    return shared


@contextmanager
def frozen(lm: LanguageModel) -> Iterator[None]:
    """While open, no weight asks for a gradient, so that none is kept or computed."""
    thawed = [p for p in lm.network.parameters() if p.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


@dataclass(frozen=True, eq=False)
class Replay:
    """What the blocks below one returned, for further passes over the very same rows.

    Of models of every kind. What memories among these blocks decided on the rows holds too.
    """

    lm: LanguageModel
    returned: dict[nn.Module, Any]
    decided: dict[Any, Any]

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LanguageModel, layer: int, run: Callable[[], object]) -> Self:
        """Keep what the blocks below `layer` return in the pass that `run` makes."""
        replay = cls(lm, {}, {})
        blocks = [lm.block(index) for index in range(layer)]
        # Nothing looks at what a block returns but the next; an encoder's last is read beside.
        wanted = blocks if lm.kind == "encoder-decoder" else blocks[-1:]

        def kept(block: nn.Module) -> Callable[..., Any]:
            compute = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                replay.returned[block] = compute(*args, **kwargs)
                if lm.prompts is not None:
                    replay.decided.update(lm.prompts.kept)
                return replay.returned[block]

            return forward

        with replaced_forward({block: kept(block) for block in wanted}):
            run()
        for block in blocks:
            replay.returned.setdefault(block, replay.returned[blocks[-1]])
        return replay

    @contextmanager
    def told(self) -> Iterator[None]:
        """While open, those blocks return that again; gradients do not reach below."""

        def again(block: nn.Module) -> Callable[..., Any]:
            def forward(*_: Any, **__: Any) -> Any:
                if self.lm.prompts is not None:
                    self.lm.prompts.kept.update(self.decided)
                return self.returned[block]

            return forward

        with replaced_forward({block: again(block) for block in self.returned}):
            yield


@dataclass(frozen=True)
class Paused:
    """A pass over n rows, stopped after block `layer`, each row at its own token.

    `layer` is -1 for a pass that was stopped before the first block, after the embedding.
    """

    lm: LanguageModel
    layer: int
    states: Tensor
    """(n, r, width) what block `layer` (-1: the embedding) returns for the remaining tokens; zeros
    where padded."""
    lengths: Tensor
    """(n,) how many tokens remain in each row."""
    ids: Tensor
    mask: Tensor
    positions: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    block_returns: int
    """0 if the family's blocks return a tensor, otherwise the length of their tuple."""

    def resume(
        self, states: Tensor, rows: Tensor, columns: Tensor, select: Tensor | None = None
    ) -> Tensor:
        """Run the rest of the network on `states`; logits (m, vocab) at (row, remaining column).

        Equal to a full pass in which block `layer` returns `states`, gradients included, also where
        attention sees only a window of the last tokens.

        Args:
            states: (n, r, width) what block `layer` (-1: the embedding) shall return.
            rows: (m,) indices into the (selected) rows.
            columns: (m,) positions among the remaining tokens, 0 being the first.
            select: (k,) only these rows are run; `states` then has k rows.
        """

        def pick(tensor: Tensor) -> Tensor:
            return tensor if select is None else tensor[select.to(tensor.device)]

        lm, cache = self.lm, DynamicCache()
        for index in range(lm.layers):
            # Blocks that stand aside never look at their keys, but the cache's length is read off
            # the first of them: a sliver of the right length will do.
            above = index - self.layer - 1
            if self.keys and self.keys[max(above, 0)].shape[-2]:
                keys, values = pick(self.keys[max(above, 0)]), pick(self.values[max(above, 0)])
                if above < 0:
                    keys, values = keys[:, :1, :, :1], values[:, :1, :, :1]
                cache.update(keys, values, index)
        # Nothing reads what the last block's MLP says of other tokens.
        top = nullcontext() if lm.anatomy.flat_mlp else computed_at(lm.mlp(-1), rows, columns)
        with self._standing_aside(states), top, gathered_input(lm.head, rows, columns):
            logits = lm.network(
                input_ids=pick(self.ids),
                attention_mask=pick(self.mask),
                position_ids=pick(self.positions),
                past_key_values=cache,
                use_cache=True,
            ).logits
        assert isinstance(logits, Tensor)
        return logits

    @contextmanager
    def _standing_aside(self, states: Tensor) -> Iterator[None]:
        def give(hidden: Tensor) -> Any:
            return (hidden, *[None] * (self.block_returns - 1)) if self.block_returns else hidden

        forwards: dict[Any, Any] = {
            self.lm.block(index): lambda hidden, *_, **__: give(hidden)
            for index in range(self.layer)
        }
        if self.layer >= 0:
            forwards[self.lm.block(self.layer)] = lambda hidden, *_, **__: give(states.to(hidden))
        else:
            forwards[self.lm.embedding] = lambda *_, **__: states
        with replaced_forward(forwards):
            yield


@dataclass(frozen=True)
class Recorded:
    """A pass over n rows with all it takes to go on from any token of any of them."""

    lm: LanguageModel
    batch: Batch
    lengths: Tensor
    """(n,) tokens of each row, on the CPU."""
    states: dict[int, Tensor]
    """(n, t, width) what the recorded blocks (-1: the embedding) returned."""
    keys: list[Tensor]
    """(n, heads, t, size), for each block."""
    values: list[Tensor]
    block_returns: int
    """0 if the family's blocks return a tensor, otherwise the length of their tuple."""

    def paused(
        self, starts: Sequence[int], layer: int, rows: Sequence[int] | None = None
    ) -> Paused:
        """The pass as it was after block `layer`, each row at its token.

        Args:
            starts: the first token to be recomputed later, of each of `rows`.
            layer: a recorded block, whose output is given anew at each `resume`; -1 to run all.
            rows: which rows to go on with, any of them as often as wanted; by default all.

        Raises:
            TokenizationError: the rows do not fit side by side (GPT-Neo alone, near its length).
        """
        chosen = torch.arange(len(self.lengths)) if rows is None else torch.tensor(list(rows))
        lengths, start = self.lengths[chosen], torch.tensor(list(starts))
        assert ((start >= 0) & (start < lengths)).all()
        width, past = int((lengths - start).max()), int(start.max())
        lm = self.lm
        if lm.anatomy.fixed_mask and past + width > lm.max_length:
            raise TokenizationError(
                f"{past} tokens before the subject in one text and {width} from it on in another "
                f"do not fit side by side into the {lm.max_length} that {lm.name} reads. Shorten "
                "the texts, or edit them one by one."
            )
        ahead = start[:, None] + torch.arange(width)
        behind = start[:, None] + torch.arange(past) - past
        real_ahead, real_behind = ahead < lengths[:, None], behind >= 0
        ahead, behind = ahead.clamp(max=self.batch.ids.shape[1] - 1), behind.clamp(min=0)
        device, row = self.batch.ids.device, chosen[:, None]

        def gathered(tensor: Tensor) -> Tensor:
            """(n, heads, t, size) -> (m, heads, past, size), each row's past at the right edge."""
            there = tensor.device
            return tensor.transpose(1, 2)[row.to(there), behind.to(there)].transpose(1, 2)

        states = self.states[layer]
        states = states[row.to(states.device), ahead.to(states.device)]
        return Paused(
            lm=lm,
            layer=layer,
            states=states * real_ahead[..., None].to(states),
            lengths=(lengths - start).to(device),
            ids=self.batch.ids[row.to(device), ahead.to(device)],
            mask=torch.cat([real_behind, real_ahead], dim=1).long().to(device),
            positions=ahead.clamp(max=lm.max_length - 1).to(device),
            keys=[gathered(keys) for keys in self.keys[layer + 1 :]],
            values=[gathered(values) for values in self.values[layer + 1 :]],
            block_returns=self.block_returns,
        )


@torch.no_grad()
def record(lm: LanguageModel, rows: Sequence[Sequence[int]], layers: Iterable[int]) -> Recorded:
    """One pass over n rows of token ids; keep the outputs of `layers` and all keys and values.

    Args:
        lm: the model; what hooks do to the pass is recorded with it.
        rows: n rows of token ids.
        layers: blocks after which the pass may be taken up; -1 is the embedding.

    Raises:
        ConfigError: the model is not a decoder.
    """
    lm.require_decoder("recomputing the tokens after a place")
    batch = pad(lm, rows)
    cache = DynamicCache()
    returns: list[int] = []
    note = lm.block(0).register_forward_hook(
        lambda _module, _args, output: returns.append(
            len(output) if isinstance(output, tuple) else 0
        )
    )
    watched = {layer: lm.block(layer) if layer >= 0 else lm.embedding for layer in layers}
    try:
        with captured(watched, "output") as seen, stopped_after(lm.block(-1)):
            lm.network(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        note.remove()
    entries: list[Any] = list(cache.layers)
    return Recorded(
        lm=lm,
        batch=batch,
        lengths=torch.tensor([len(row) for row in rows]),
        states=seen.outputs,
        keys=[entry.keys for entry in entries],
        values=[entry.values for entry in entries],
        block_returns=returns[-1],
    )


def pause(
    lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int], layer: int
) -> Paused:
    """One clean pass; keep what `resume` needs to go on above block `layer`, from given tokens on.

    Args:
        lm: the model.
        rows: n rows of token ids.
        starts: each row's first token to be recomputed later.
        layer: the block whose output is given anew at each `resume`; -1 to run all blocks.

    Raises:
        TokenizationError: the rows do not fit side by side (GPT-Neo alone, near its length).
        ConfigError: the model is not a decoder.
    """
    assert -1 <= layer < lm.layers
    return record(lm, rows, [layer]).paused(starts, layer)
