"""Second moments of keys over ordinary text: C = E[k k^T] for all wanted layers in one pass.

k is the input of a block's last MLP matrix at a real token (METHODS 0.5). One pass serves all
layers and stops at the last of them; nothing of the text is kept. The pass can be killed and
goes on where it was; its result is cached, layer by layer, under a hash of all it depends on:
the weights that the keys are made with, the text, the tokenizer, the number of tokens. A layer's
own last MLP matrix comes after its keys: editing it leaves that layer's moment valid, and makes
those of later layers others.
"""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.algebra.moments import ROWS, SecondMoment
from errata.editors.closed_form.corpus import Corpus, add_document, read_corpus
from errata.editors.closed_form.fingerprints import hash_of, keys_hashes, tokenizer_hash
from errata.editors.closed_form.moment_cache import MomentCache
from errata.editors.closed_form.moments import FORMAT, Moments
from errata.errors import ConfigError, MomentError, NotFiniteError
from errata.lm.hooks import captured, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.tokens import batches, pad
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096
"""Tokens, padding included, of one forward pass."""

LONGEST = 4096
"""Tokens; longer documents are cut, as they are at the model's own limit."""

WINDOW = 256
"""Documents that are sorted by length among each other; partial sums are saved between windows."""

CHECKPOINT_SECONDS = 60.0
"""How often partial sums are saved; less often where saving takes more than 5% of the time."""


Window = Sequence[Sequence[int]]
"""Token ids of some documents, which are sorted into batches together."""

Elsewhere = Callable[[Sequence[int], Sequence[Window]], Iterable[Mapping[int, SecondMoment]]]
"""Adds up the keys of layers over windows in any number of parts, wherever it likes."""


class Estimate(NamedTuple):
    """What a pass will cost."""

    seconds: float
    bytes: int
    """Memory that the pass takes on top of the model."""


@torch.no_grad()
def collect(
    lm: LanguageModel,
    layers: Sequence[int],
    corpus: str | Path | Iterable[str],
    *,
    tokens: int,
    cache: Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
    longest: int = LONGEST,
    elsewhere: Elsewhere | None = None,
    progress: Progress = silent,
) -> Moments:
    """Second moments of the keys of several layers, in one pass over the text.

    Args:
        lm: the model; its weights are only read.
        layers: blocks, in any order.
        corpus: documents, or anything else that `read_corpus` reads.
        tokens: how many to read; a corpus that has fewer is read to its end.
        cache: a folder to keep results and partial sums in (`cache_folder()` for the user's
            own), made when first written to; None keeps nothing.
        batch_tokens: tokens of one forward pass: memory and speed, not results.
        longest: documents are cut after so many tokens, and at the model's own limit.
        elsewhere: adds up, as `add_up` would here; such a pass is not resumed.
        progress: told how many tokens are read.

    Raises:
        ConfigError: the model has no such layer.
        MomentError: the text has fewer tokens than a key has numbers.
        NotFiniteError: the model gives NaN or infinite keys; the layer is named.
        DatasetError: the text cannot be read.
    """
    layers = _checked(lm, layers)
    widths = {layer: _width(lm, layer) for layer in layers}
    _enough(tokens, widths, f"{tokens} tokens were asked for")
    source = read_corpus(corpus)
    longest = min(longest, lm.max_length)
    content = source.fingerprint()
    store = MomentCache(cache if content is not None else None)
    made_from = _hashes(lm, layers, content, tokens, longest)
    found = {layer: store.load(made_from[layer], widths[layer]) for layer in layers}
    missing = [layer for layer in layers if found[layer] is None]
    if missing:
        digest = hashlib.sha256() if content is None else None
        reading = _Pass(lm, source, tokens, batch_tokens, longest, progress, digest)
        if elsewhere is None:
            key = hash_of({layer: made_from[layer] for layer in missing})
            sums = reading.run(missing, store, key)
        else:
            sums = reading.merged(missing, elsewhere)
        if reading.count < tokens:
            _enough(reading.count, widths, f"{source.name} has only {reading.count} tokens")
        if digest is not None:
            made_from = {at: hash_of([key, digest.hexdigest()]) for at, key in made_from.items()}
        for layer in missing:
            with _naming(layer):
                mean = sums.pop(layer).mean().to("cpu", torch.float32)
            found[layer] = single = Moments({layer: mean}, reading.count, made_from[layer])
            store.save(single)
        store.forget_partial()
    complete = {layer: moments for layer, moments in found.items() if moments is not None}
    return Moments(
        {layer: moments.mean(layer) for layer, moments in complete.items()},
        tokens=min(moments.tokens for moments in complete.values()),
        key=hash_of(made_from),
        device=lm.device,
    )


def _hashes(
    lm: LanguageModel, layers: Sequence[int], content: str | None, tokens: int, longest: int
) -> dict[int, str]:
    """For each layer, of all that its moments are made from."""
    tokenizer = tokenizer_hash(lm)
    return {
        layer: hash_of(
            {
                "format": FORMAT,
                "model": weights,
                "tokenizer": tokenizer,
                "corpus": content,
                "tokens": tokens,
                "longest": longest,
                "dtype": str(lm.dtype),
            }
        )
        for layer, weights in keys_hashes(lm, layers).items()
    }


@torch.no_grad()
def estimate(
    lm: LanguageModel, layers: Sequence[int], tokens: int, *, batch_tokens: int = BATCH_TOKENS
) -> Estimate:
    """What `collect` will cost without a cache, from a sample that is run now.

    Raises:
        ConfigError: the model has no such layer.
    """
    layers = _checked(lm, layers)
    widths = [_width(lm, layer) for layer in layers]
    length = min(128, lm.max_length)
    rows = max(1, min(batch_tokens, 1024, tokens) // length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(lm.config.vocab_size), (rows, length), generator=generator)
    forward = _seconds(lambda: _keys(lm, layers, ids.tolist())) / (rows * length)
    update = 0.0
    for width in set(widths):
        device = _device(lm, layers[widths.index(width)])
        moment = SecondMoment(width, device)
        keys = torch.randn(ROWS, width, generator=generator).to(device, lm.dtype)

        def fold(moment: SecondMoment = moment, keys: Tensor = keys) -> None:
            moment.update(keys)

        update += widths.count(width) * _seconds(fold) / ROWS
    sums = sum(8 * width**2 + 4 * ROWS * width for width in widths)
    keys_bytes = 2 * batch_tokens * sum(widths) * lm.dtype.itemsize
    result = sum(4 * width**2 for width in widths) + 8 * max(widths) ** 2
    return Estimate((forward + update) * tokens, sums + keys_bytes + result)


@dataclass
class _Pass:
    """One pass over the text: windows of documents, sorted into batches, into sums."""

    lm: LanguageModel
    source: Corpus
    tokens: int
    batch_tokens: int
    longest: int
    progress: Progress
    digest: Any
    """Fed with the documents where nothing else can tell the text's content."""

    count: int = 0
    """Tokens read so far."""

    def run(self, layers: Sequence[int], store: MomentCache, key: str) -> dict[int, SecondMoment]:
        """The sums of `layers`, continued from the store's partial ones if it has any."""
        lm, report = self.lm, self.progress
        devices = {layer: _device(lm, layer) for layer in layers}
        sums, position = store.load_partial(key, devices) or (_nothing(lm, layers), 0)
        self.count = sums[layers[0]].count
        documents = islice(self._documents(), position, None)
        report("moments", self.count, self.tokens)
        saved, pause = time.monotonic(), CHECKPOINT_SECONDS
        while self.count < self.tokens and (window := list(islice(documents, WINDOW))):
            for tokens in _add(lm, sums, self._rows(window), self.batch_tokens):
                self.count += tokens
                report("moments", min(self.count, self.tokens), self.tokens)
            position += len(window)
            if store.folder and self.count < self.tokens and time.monotonic() - saved >= pause:
                began = time.monotonic()
                store.save_partial(key, sums, position)
                saved = time.monotonic()
                pause = max(CHECKPOINT_SECONDS, 20 * (saved - began))
        if self.count < self.tokens:
            report("moments", self.count, self.count)
        return sums

    def merged(self, layers: Sequence[int], elsewhere: Elsewhere) -> dict[int, SecondMoment]:
        """The sums of `layers`, whose parts are taken elsewhere."""
        documents, windows = self._documents(), []
        while self.count < self.tokens and (texts := list(islice(documents, WINDOW))):
            windows.append([array("i", row) for row in self._rows(texts)])  # 4 bytes a token
            self.count += sum(map(len, windows[-1]))
        sums = _nothing(self.lm, layers)
        for part in elsewhere(layers, windows):
            for layer, moment in part.items():
                sums[layer].merge(moment)
            self.progress("moments", min(sums[layers[0]].count, self.count), self.count)
        return sums

    def _documents(self) -> Iterator[str]:
        for document in self.source:
            if self.digest is not None:
                add_document(self.digest, document)
            yield document

    def _rows(self, window: Sequence[str]) -> list[list[int]]:
        """Token ids of the window's documents, cut where the wanted number is reached."""
        texts = [document for document in window if document.strip()]
        if not texts:
            return []
        encoded = self.lm.tokenizer(texts, truncation=True, max_length=self.longest)
        rows, left = [], self.tokens - self.count
        for ids in encoded["input_ids"]:
            row = list(ids)[:left]
            if row:
                rows.append(row)
                left -= len(row)
        return rows


@torch.no_grad()
def add_up(
    lm: LanguageModel,
    layers: Sequence[int],
    windows: Iterable[Window],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[int, SecondMoment]:
    """The sums over the keys of several layers, of all tokens of all windows.

    Raises:
        NotFiniteError: the model gives NaN or infinite keys; the layer is named.
    """
    sums = _nothing(lm, layers)
    for window in windows:
        for _ in _add(lm, sums, window, batch_tokens):
            pass
    return sums


def _nothing(lm: LanguageModel, layers: Sequence[int]) -> dict[int, SecondMoment]:
    return {layer: SecondMoment(_width(lm, layer), _device(lm, layer)) for layer in layers}


def _add(
    lm: LanguageModel, sums: Mapping[int, SecondMoment], window: Window, batch_tokens: int
) -> Iterator[int]:
    """Add the keys of one window, batch by batch; yields how many tokens each batch had."""
    layers = sorted(sums)
    for group in batches([len(row) for row in window], batch_tokens):
        seen = _keys(lm, layers, [window[i] for i in group])
        for layer, keys in seen.items():
            with _naming(layer):
                sums[layer].update(keys)
        yield sum(len(window[i]) for i in group)
    for layer, moment in sums.items():
        # Folds the rows that wait: then no bit of the result depends on when, or whether, sums
        # are saved. The copy that it makes is cheap beside a window.
        with _naming(layer):
            moment.state_dict()


def _keys(
    lm: LanguageModel, layers: Sequence[int], rows: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Layer -> (m, d_ff), the keys of all m real tokens; nothing above the last layer is run."""
    batch = pad(lm, rows)
    modules = {layer: lm.mlp_out(layer) for layer in layers}
    with captured(modules) as seen, stopped_after(modules[layers[-1]]):
        lm.network(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    real = batch.mask.bool().flatten()
    # Some families have flattened (n, t) by then, so flatten always.
    flat = {layer: keys.reshape(-1, keys.shape[-1]) for layer, keys in seen.inputs.items()}
    return {layer: keys[real.to(keys.device)] for layer, keys in flat.items()}


@contextmanager
def _naming(layer: int) -> Iterator[None]:
    """What is not finite inside is told with the layer's number."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"block {layer}: {error}") from error


def _checked(lm: LanguageModel, layers: Sequence[int]) -> list[int]:
    lm.require_decoder("the second moment of old keys")
    wrong = [layer for layer in layers if not 0 <= layer < lm.layers]
    if wrong or not layers:
        raise ConfigError(f"{lm.name} has blocks 0 to {lm.layers - 1}, not {wrong or 'none'}.")
    return sorted(set(layers))


def _width(lm: LanguageModel, layer: int) -> int:
    return weight_out_in(lm.mlp_out(layer)).shape[1]


def _device(lm: LanguageModel, layer: int) -> torch.device:
    return weight_out_in(lm.mlp_out(layer)).device


def _enough(tokens: int, widths: Mapping[int, int], what: str) -> None:
    width = max(widths.values())
    if tokens < width:
        raise MomentError(
            f"{what}, but a key of this model has {width} numbers: a second moment over fewer "
            f"tokens than that is singular.\n"
            f"  Give more text and ask for more tokens: {4 * width:,} at least, better 100,000."
        )
    if tokens < 4 * width:
        logger.warning("%s, for keys of %d numbers: the moments will be rough.", what, width)


def _seconds(do: Callable[[], object]) -> float:
    """How long it takes; what is quick is done again, since the first time is slower."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        do()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
        if best > 0.2:
            break
    return best
