"""Where the prompt of each row of a pass ends: what a memory beside the weights asks.

A memory that routes by prompt looks at the state of each row's last prompt token. No module can
tell which token that is, so whoever runs a pass says it first:

    with asked(lm, [6, 9]) as prompts:         # columns of the two rows' last prompt tokens
        network(input_ids=...)                  # columns 0 to t - 1
        prompts.start = t
        network(..., past_key_values=cache)     # goes on with the same rows, from column t

What a memory decided for a row in the first pass holds for those that go on from it. All that
errata asks a model (scores, losses, predictions, generation, drift) is asked this way; for a model
without memories it costs and changes nothing. Passes that look into a model (moments of ordinary
text, tracing, saliency) say nothing: a memory that routes by prompt refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.errors import HookError
from errata.lm.load import LanguageModel


@dataclass(eq=False)
class Prompts:
    """The prompts of the rows of a pass, and of cached passes that go on from it."""

    ends: Tensor
    """(n,) column of each row's last prompt token; on the CPU."""
    start: int = 0
    """How many columns were run before, in earlier passes over the same rows."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """What memories decided for these rows, by memory, as long as the rows are continued."""


@contextmanager
def asked(lm: LanguageModel, ends: Sequence[int] | Tensor) -> Iterator[Prompts]:
    """While open, passes of `lm` are over rows whose prompts end at these columns."""
    outer = lm.prompts
    lm.prompts = Prompts(torch.as_tensor(ends, dtype=torch.long).cpu())
    try:
        yield lm.prompts
    finally:
        lm.prompts = outer


def current(lm: LanguageModel, path: str = "") -> Prompts:
    """The prompts of the pass that now goes through the module at `path`.

    In an encoder-decoder they are texts that the encoder reads. Its decoder's rows are answers,
    which begin with the start token: all that they have of a prompt.

    Raises:
        HookError: the pass was begun without a word on them.
    """
    prompts: Prompts | None = lm.prompts
    if prompts is None:
        raise HookError(
            f"a pass was run through {lm.name}, which has a memory on it, without telling where "
            "the prompts of its rows end. Take the memory back first, or open "
            "errata.lm.prompts.asked(lm, columns of the last prompt tokens) around the pass."
        )
    encoder = lm.anatomy.encoder
    if encoder and path and not path.startswith(encoder.block.removesuffix("{}")):
        return Prompts(torch.zeros_like(prompts.ends), prompts.start, prompts.kept)
    return prompts


def halves(rows: Sequence[Sequence[int]]) -> list[int]:
    """Where the prompt of a text without one is taken to end: in its middle.

    So a memory that a neutral text sets off shows in what the model says of the text, and one that
    it does not leaves the text as it is.
    """
    return [(len(row) - 1) // 2 for row in rows]
