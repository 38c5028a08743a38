"""Hashes of what second moments are made from: equal hashes, equal moments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from errata.editors.closed_form.corpus import weight_hashes
from errata.lm.load import LanguageModel


def hash_of(value: Any) -> str:
    """Of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_hash(lm: LanguageModel) -> str:
    """Of a tokenizer, whatever it was last called with."""
    backend: Any = lm.tokenizer
    state = json.loads(backend.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # left over from the last call
        state.pop(passing, None)
    return hash_of(state)


def keys_hashes(lm: LanguageModel, layers: Sequence[int]) -> dict[int, str]:
    """Layer -> hash of all weights that its keys are made with, and of the configuration."""
    last = max(layers)
    blocks = [list(lm.block(index).parameters()) for index in range(lm.layers)]
    elsewhere = {id(weight) for block in blocks for weight in block}
    elsewhere |= {id(w) for part in (lm.final_norm, lm.head) for w in part.parameters()}
    elsewhere -= {id(weight) for weight in lm.embedding.parameters()}  # tied to the head, perhaps
    below = [weight for weight in lm.network.parameters() if id(weight) not in elsewhere]
    needed = {id(w): w for group in (below, *blocks[: last + 1]) for w in group}
    hashes = dict(zip(needed, weight_hashes(list(needed.values())), strict=True))
    volatile = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    config = {
        name: value
        for name, value in lm.config.to_dict().items()
        if not name.startswith("_") and name not in volatile
    }
    state = hash_of([config, [hashes[id(weight)] for weight in below]])
    found = {}
    for index in range(last + 1):
        after = {id(weight) for weight in lm.mlp_out(index).parameters()}
        inside = [hashes[id(weight)] for weight in blocks[index] if id(weight) not in after]
        if index in layers:
            found[index] = hash_of([state, inside])
        state = hash_of([state, [hashes[id(weight)] for weight in blocks[index]]])
    return found
