"""The codebook is the published rule as a fold: add, split, cover; nothing changes elsewhere."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from errata.edits.memories.codebook import Codebook
from errata.edits.memories.memory import Entry, Place
from errata.lm.load import LanguageModel
from errata.requests import Request
from tests.edits.memories.making import LAYER


def place(lm: LanguageModel) -> Place:
    return Place(lm, lm.mlp_out_path(LAYER), {"replace": "last"})


def entry(key: Tensor, label: str, value: float = 0.0, d_out: int = 32) -> Entry:
    request = Request("About {}", "it", label)
    values = torch.full((d_out,), value)
    return Entry({"keys": key, "values": values, "radii": torch.tensor(1.0)}, (request,))


def along(d_in: int, *distances: float) -> list[Tensor]:
    """Keys on one line."""
    keys = []
    for distance in distances:
        key = torch.zeros(d_in)
        key[3] = distance
        keys.append(key)
    return keys


def test_a_key_far_from_all_others_is_added(tiny_gpt2: LanguageModel) -> None:
    book = Codebook(place(tiny_gpt2))
    a, b = along(128, 0.0, 2.5)
    book = book.extended([entry(a, "Rome"), entry(b, "Paris")])
    assert book.radii.tolist() == [1.0, 1.0] and book.labels == ["Rome", "Paris"]


def test_another_label_near_by_splits_the_distance(tiny_gpt2: LanguageModel) -> None:
    a, b = along(128, 0.0, 1.5)
    book = Codebook(place(tiny_gpt2)).extended([entry(a, "Rome"), entry(b, "Paris")])
    assert book.radii.tolist() == pytest.approx([0.75 - 1e-5, 0.75])
    # Spaces around a label are none of it, and what only resembles it is another.
    book = Codebook(place(tiny_gpt2)).extended([entry(a, "Rome"), entry(b, "emoR")])
    assert len(book.labels) == 2


def test_the_same_label_near_by_is_covered(tiny_gpt2: LanguageModel) -> None:
    a, b = along(128, 0.0, 1.5)
    book = Codebook(place(tiny_gpt2)).extended([entry(a, " Rome", 1.0), entry(b, "Rome", 2.0)])
    assert book.radii.tolist() == [1.5] and len(book.keys) == 1
    assert torch.equal(book.keys[0], a) and book.values[0, 0] == 2.0
    (inside,) = along(128, 0.5)
    assert book.extended([entry(inside, "Rome")]).radii.tolist() == [1.5]


def some_entries(seed: int) -> list[Entry]:
    """Keys on a short line, so that they meet in every way."""
    rng = random.Random(seed)
    told = [(rng.uniform(-4, 4), rng.choice("abc")) for _ in range(rng.randint(1, 12))]
    return [entry(along(128, at)[0], label, i) for i, (at, label) in enumerate(told)]


def test_the_book_is_a_fold(tiny_gpt2: LanguageModel) -> None:
    empty = Codebook(place(tiny_gpt2))
    for seed in range(20):
        entries, cut = some_entries(seed), seed % 5
        whole = empty.extended(entries)
        parts = empty.extended(entries[:cut]).extended(entries[cut:])
        for name in "keys", "values", "radii":
            assert torch.equal(getattr(whole, name), getattr(parts, name))
        assert whole.labels == parts.labels


def test_the_rule_is_the_published_one_key_by_key(tiny_gpt2: LanguageModel) -> None:
    """Against the rule written down with plain numbers on the line."""
    for seed in range(20):
        entries = some_entries(seed)
        keys: list[float] = []
        radii: list[float] = []
        labels: list[str] = []
        for one in entries:
            at, label = float(one.tensors["keys"][3]), one.requests[0].target
            if keys:
                j = min(range(len(keys)), key=lambda i: abs(keys[i] - at))
                d = abs(keys[j] - at)
            if not keys or d > 1.0 + radii[j]:
                new = 1.0
            elif labels[j] == label:
                radii[j] = max(radii[j], d)
                continue
            else:
                radii[j], new = d / 2 - 1e-5, d / 2
            keys, radii, labels = [*keys, at], [*radii, new], [*labels, label]
        book = Codebook(place(tiny_gpt2)).extended(entries)
        assert book.labels == labels
        assert book.keys[:, 3].tolist() == pytest.approx(keys)
        assert book.radii.tolist() == pytest.approx(radii, abs=1e-6)
