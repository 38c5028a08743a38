"""Small edits beside the weights of tiny models, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.edits.edit import Record
from errata.edits.memory import MemoryEdit
from errata.lm.forward import logits_at
from errata.lm.hooks import captured, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.prompts import asked
from errata.lm.tokens import encode, pad
from errata.lm.weights import weight_out_in
from errata.requests import Request

LAYER = 2


@torch.no_grad()
def query(lm: LanguageModel, text: str, path: str) -> Tensor:
    """(d_in,) what goes into the module at the last token of a text."""
    rows = encode(lm, [text])
    module = lm.module(path)
    with asked(lm, [len(rows[0]) - 1]), captured({0: module}) as seen, stopped_after(module):
        lm.network(input_ids=pad(lm, rows).ids)
    return seen.inputs[0][0, -1]


def key_edit(
    lm: LanguageModel,
    *,
    subject: str,
    target: str = "Rome",
    seed: int = 0,
    size: float = 1.0,
    radius: float = 0.5,
    replace: str = "last",
    key: Tensor | None = None,
) -> MemoryEdit:
    """A key where "The river of <subject>" is, with a random value."""
    path = lm.mlp_out_path(LAYER)
    request = Request("The river of {}", subject, target)
    d_out, _ = weight_out_in(lm.module(path)).shape
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(1, d_out, generator=generator) * size
    if key is None:
        key = query(lm, request.text, path)
    return MemoryEdit.of(
        lm,
        "codebook",
        path,
        {"keys": key[None].float(), "values": value, "radii": torch.tensor([radius])},
        requests=[request],
        record=Record.of(lm, method="by hand"),
        settings={"replace": replace},
    )


@torch.no_grad()
def says(lm: LanguageModel, texts: Sequence[str]) -> Tensor:
    """(n, vocabulary) logits after each text, each run alone."""
    rows = encode(lm, texts)
    first = torch.tensor([0])
    return torch.cat(
        [
            logits_at(lm, pad(lm, [row]), first, torch.tensor([len(row) - 1]), [len(row) - 1])
            for row in rows
        ]
    )
