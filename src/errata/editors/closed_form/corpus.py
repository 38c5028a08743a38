"""Ordinary text, for second moments: files, folders, Hub data sets, or strings from Python.

A corpus is read as a stream of documents and never held in memory. Where its content can be
told before it is read (a file's bytes, a list's strings), moments taken over it are cached.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from errata.errors import DatasetError, MomentError
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode
from errata.lm.weights import weight_hash
from errata.progress import Progress, silent

_JSON_LINES = {".jsonl", ".ndjson"}
_TEXT = {".txt", ".text", ".md"}

_LONGEST_DOCUMENT = 1_000_000
"""Characters; what is longer is read as several documents, so that no file fills the memory."""

_STARTS = (
    *("The", "In", "A", "He", "She", "It", "They", "This", "When", "For", "But", "After"),
    *("There", "One", "Many", "During", "By", "On", "At", "As", "However", "I", "You", "We"),
    *("Today", "What", "Some", "If", "From", "Although", "Most", "Because"),
)
"""How sampled documents begin, in turn."""

_STARTED_AT_ONCE = 64
_DOCUMENT_TOKENS = 128
_TOP_K = 50


@dataclass(frozen=True)
class Corpus:
    """A stream of documents that knows its own content."""

    name: str
    """As messages and records say it."""

    documents: Callable[[], Iterator[str]]
    """Begins the stream."""

    fingerprint: Callable[[], str | None]
    """Hash of the content; None where only reading it can tell, and it can be read only once."""

    def __iter__(self) -> Iterator[str]:
        return self.documents()


def read_corpus(source: str | Path | Iterable[str]) -> Corpus:
    """Any text as a corpus.

    Args:
        source: one of

            - a text file: a document is a paragraph if at least one line in twenty is blank,
              otherwise a line;
            - a `.jsonl` file: one object with a "text" field on each line;
            - a folder: its `.txt`, `.text`, `.md`, `.jsonl` and `.ndjson` files, also in
              subfolders, in order of their paths;
            - "hub:name[:config][:split][:field]": a data set of the Hugging Face Hub (split
              "train" and field "text" where left out), streamed; needs `errata[hub]`;
            - any iterable of documents. An iterator that can be read only once is used as it
              comes, and moments taken over it cannot be found in the cache.

    Raises:
        DatasetError: there is no such file, folder or data set. What is wrong inside a file is
            told when it is read.
    """
    if isinstance(source, Corpus):
        return source
    if isinstance(source, str) and source.startswith("hub:"):
        return _hub(source)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return _files(str(path), [path])
        raise DatasetError(
            f"there is no file or folder {str(source)!r} to read text from. Give a text file, a "
            'folder, a .jsonl file, or "hub:name" for a data set of the Hugging Face Hub.'
        )
    return _strings(source)


def own_text(
    lm: LanguageModel, tokens: int, seed: int = 0, *, progress: Progress = silent
) -> Corpus:
    """Documents sampled from the model itself: the fallback where the user has no text.

    Preserving what the model says of its own accord is sensible, but narrower than preserving
    what it does on the text that matters to the user, whose own corpus is the better choice.
    Nothing is sampled before the first document is wanted: moments that are in the cache (under
    the hash of all weights, the seed and the number of tokens) cost no sampling.

    Args:
        lm: the model; sampled with top-k 50 after common first words, in turn.
        tokens: about how many; a little more is written.
        seed: of the sampling.
        progress: told how many tokens are written.

    Reading it raises MomentError where the model writes nothing.
    """
    written: list[str] = []

    def documents() -> Iterator[str]:
        if not written:
            written.extend(_sampled(lm, tokens, seed, progress))
        return iter(written)

    def fingerprint() -> str:
        content = f"own text {tokens} {seed} {_TOP_K} {_DOCUMENT_TOKENS} {_STARTS}"
        digest = hashlib.sha256(content.encode())
        for one in weight_hashes(list(lm.network.parameters())):
            digest.update(one.encode())
        return digest.hexdigest()

    return Corpus(f"{lm.name}'s own text (seed {seed})", documents, fingerprint)


def _sampled(lm: LanguageModel, tokens: int, seed: int, progress: Progress) -> list[str]:
    documents: list[str] = []
    written, batch = 0, 0
    length = min(_DOCUMENT_TOKENS, lm.max_length // 2)
    lengths = [len(row) for row in encode(lm, _STARTS)]
    usual = max(set(lengths), key=lengths.count)  # equal lengths are written in one batch
    words = [word for word, size in zip(_STARTS, lengths, strict=True) if size == usual]
    progress("own text", 0, tokens)
    while written < tokens:
        starts = [words[i % len(words)] for i in range(_STARTED_AT_ONCE)]
        texts = complete(lm, starts, new_tokens=length, top_k=_TOP_K, seed=seed + batch)
        new = [start + text for start, text in zip(starts, texts, strict=True) if text.strip()]
        if not new:
            raise MomentError(
                f"{lm.name} writes nothing to take second moments from; give a corpus instead."
            )
        # Cut: half a character at a text's end takes more tokens when it is read again.
        read = lm.tokenizer(new, truncation=True, max_length=lm.max_length)["input_ids"]
        documents += new
        written, batch = written + sum(len(row) for row in read), batch + 1
        progress("own text", min(written, tokens), tokens)
    return documents


def weight_hashes(weights: Sequence[Tensor]) -> list[str]:
    """The hash of each weight; several at a time, since hashing frees the interpreter."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(weight_hash, weights))


def _strings(source: Iterable[str]) -> Corpus:
    def documents() -> Iterator[str]:
        for number, document in enumerate(source):
            if not isinstance(document, str):
                raise DatasetError(
                    f"document {number} is of type {type(document).__name__}; a corpus is made of "
                    "strings, one for each document."
                )
            yield document

    def fingerprint() -> str | None:
        if iter(source) is source:
            return None
        digest = hashlib.sha256()
        for document in documents():
            add_document(digest, document)
        return digest.hexdigest()

    return Corpus("documents from Python", documents, fingerprint)


def add_document(digest: Any, document: str) -> None:
    """Feed a hash with a document and its end."""
    data = document.encode("utf-8", "surrogatepass")
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _folder(folder: Path) -> Corpus:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _JSON_LINES | _TEXT and path.is_file()
    )
    if not files:
        raise DatasetError(
            f"the folder {folder} holds no text: neither it nor a folder in it has a file that "
            f"ends in {', '.join(sorted(_JSON_LINES | _TEXT))}."
        )
    return _files(str(folder), files)


def _files(name: str, files: Sequence[Path]) -> Corpus:
    def documents() -> Iterator[str]:
        for path in files:
            read = _json_lines if path.suffix.lower() in _JSON_LINES else _text_file
            try:
                yield from read(path)
            except (OSError, UnicodeDecodeError) as error:
                raise DatasetError(f"cannot read {path} as UTF-8 text: {error}") from error

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for path in files:
            try:
                with path.open("rb") as handle:
                    content = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError as error:
                raise DatasetError(f"cannot read {path}: {error}") from error
            digest.update(f"{path.suffix.lower()} {content}\n".encode())
        return digest.hexdigest()

    return Corpus(name, documents, fingerprint)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as handle:
        while line := handle.readline(_LONGEST_DOCUMENT):
            yield line


def _text_file(path: Path) -> Iterator[str]:
    blank = lines = 0
    for line in _lines(path):
        lines, blank = lines + 1, blank + (not line.strip())
    if 20 * blank < lines:
        yield from (line.strip() for line in _lines(path) if line.strip())
        return
    paragraph, size = [], 0
    for line in _lines(path):
        if line.strip():
            paragraph.append(line)
            size += len(line)
        if paragraph and (not line.strip() or size >= _LONGEST_DOCUMENT):
            yield "".join(paragraph).strip()
            paragraph, size = [], 0
    if paragraph:
        yield "".join(paragraph).strip()


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{path}, line {number} is not JSON: {error}") from error
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise DatasetError(
                    f'{path}, line {number}: expected an object with a "text" field that holds a '
                    f"string, got {line.strip()[:60]!r}."
                )
            yield text


def _hub(spec: str) -> Corpus:
    parts = spec.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 4:
        raise DatasetError(f"{spec!r} is no data set; write hub:name[:config][:split][:field].")
    name, config, split, field = (*parts, *[""] * (4 - len(parts)))
    split, field = split or "train", field or "text"
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise DatasetError(
            f"{spec!r} needs the `datasets` package: pip install 'errata[hub]'. Or give a text "
            "file, a folder or a .jsonl file instead."
        ) from error

    def failed(error: Exception) -> DatasetError:
        return DatasetError(
            f"cannot read the data set {spec!r}: {error}\n"
            "  Check the name, config and split (hub:name[:config][:split][:field]), and the "
            "network."
        )

    def documents() -> Iterator[str]:
        try:
            for row in datasets.load_dataset(name, config or None, split=split, streaming=True):
                if not isinstance(row.get(field), str):
                    raise DatasetError(
                        f"{spec!r} has no text in field {field!r}; it has {sorted(row)}. Name the "
                        "field: hub:name:config:split:FIELD."
                    )
                yield row[field]
        except (OSError, ValueError, RuntimeError) as error:
            raise failed(error) from error

    def fingerprint() -> str:
        try:
            builder = datasets.load_dataset_builder(name, config or None)
        except (OSError, ValueError, RuntimeError) as error:
            raise failed(error) from error
        # The commit, and the files that the config resolves to.
        content = f"{name} {builder.hash} {builder.config_id} {split} {field}"
        return hashlib.sha256(content.encode()).hexdigest()

    return Corpus(spec, documents, fingerprint)
