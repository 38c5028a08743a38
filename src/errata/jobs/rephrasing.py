"""Other ways to say the same: by rules that need nothing, from a file, or from any seq2seq model.

A rephraser is called with texts and says, for each, as many candidates as it can, up to `count`;
whether they are alike enough is judged elsewhere. Rules keep a text's words and change its shape:
they swap clauses, write contractions out or together, choose plainer words of the same meaning, and
put words before or after. A model's rephrasings are better, and slower.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from errata.errors import DatasetError, ModelLoadError
from errata.lm.quiet import no_weights_bar
from errata.measure.datasets.records import Record, load
from errata.progress import Progress, silent

Rephraser = Callable[[Sequence[str], int, Progress], list[list[str]]]
"""Called with (texts, count, progress): up to `count` candidates for each text."""

RULES = "rules"
"""The name of the rephraser that needs no model."""

TRIES = 12
"""Draws of rules for each candidate that is wanted."""


def rephraser(name: str | Path, *, prefix: str = "", seed: int = 0) -> Rephraser:
    """The rephraser of a name.

    Args:
        name: `rules`; a `.jsonl` file of `text` and `rephrasings`; or a seq2seq model's folder or
            Hub name.
        prefix: what such a model wants before each text, such as "paraphrase: ".
        seed: of everything drawn.

    Raises:
        DatasetError: the file is malformed.
        ModelLoadError: there is no such model.
    """
    if str(name) == RULES:
        return lambda texts, count, _: [by_rules(text, count, seed=seed) for text in texts]
    if Path(name).suffix == ".jsonl":
        return _from_file(Path(name))
    return Seq2Seq(name, prefix=prefix, seed=seed)


def by_rules(text: str, count: int, *, seed: int = 0) -> list[str]:
    """Up to `count` different rewordings of a text, the same for the same seed."""
    draw = random.Random(f"rephrase {seed} {text}")
    found: dict[str, None] = {}
    for _ in range(TRIES * count):
        new = text
        for rule in draw.sample(_RULES, draw.randint(1, 3)):
            new = rule(new, draw)
        new = " ".join(new.split())
        if new and new.lower() != " ".join(text.split()).lower():
            found[new] = None
        if len(found) == count:
            break
    return list(found)


_CONTRACTIONS = tuple(
    tuple(pair.split("|"))
    for pair in (
        "I am|I'm",
        "I have|I've",
        "I will|I'll",
        "I would|I'd",
        "it is|it's",
        "that is|that's",
        "he is|he's",
        "she is|she's",
        "we are|we're",
        "they are|they're",
        "you are|you're",
        "do not|don't",
        "does not|doesn't",
        "did not|didn't",
        "is not|isn't",
        "are not|aren't",
        "was not|wasn't",
        "were not|weren't",
        "cannot|can't",
        "could not|couldn't",
        "would not|wouldn't",
        "should not|shouldn't",
        "have not|haven't",
        "has not|hasn't",
        "had not|hadn't",
        "will not|won't",
    )
)

_SAME_MEANING = tuple(
    tuple(pair.split("|"))
    for pair in (
        "very|extremely",
        "really|truly",
        "a lot of|much",
        "big|large",
        "small|little",
        "begin|start",
        "began|started",
        "buy|purchase",
        "bought|purchased",
        "help|assist",
        "need|require",
        "show|display",
        "children|kids",
        "film|movie",
        "famous|well-known",
        "job|work",
        "because|since",
        "however|but",
        "maybe|perhaps",
        "about|regarding",
        "also|too",
        "house|home",
        "mother|mom",
        "father|dad",
        "yesterday|the day before today",
        "released|published",
        "born in|a native of",
        "located in|situated in",
        "starred in|appeared in",
        "won|received",
        "is an American|is a US",
        "died|passed away",
    )
)

_BEFORE = (
    "In other words, ",
    "As I said, ",
    "The thing is, ",
    "To put it simply, ",
    "Well, ",
    "It is said that ",
    "Someone told me: ",
    "Let me say it again: ",
    "Here is how it is: ",
    "To be clear, ",
)
_AFTER = (
    ", as they say",
    ", that is how it is",
    ", and that is all",
    ", you know",
    ", so to speak",
    ", that is the point",
)


def _contracted(text: str, draw: random.Random) -> str:
    """Contractions written out, or written together."""
    column = draw.randint(0, 1)
    for pair in _CONTRACTIONS:
        text = _replaced(text, pair[column], pair[1 - column])
    return text


def _plain_words(text: str, draw: random.Random) -> str:
    """Some words for others of the same meaning."""
    there = [
        (a, b)
        for pair in _SAME_MEANING
        for a, b in (pair, pair[::-1])
        if re.search(rf"\b{re.escape(a)}\b", text)
    ]
    for old, new in draw.sample(there, min(2, len(there))):
        text = _replaced(text, old, new)
    return text


def _swapped(text: str, draw: random.Random) -> str:
    """`When A, B.` as `B when A.`, or two sentences the other way round."""
    found = re.fullmatch(
        r"(When|While|After|Before|Because|Since|If|Although|As) ([^,.!?]+), ([^.!?]+)([.!?]?)\s*",
        text,
    )
    if found:
        first, a, b, end = found.groups()
        return f"{_upper(b)} {first.lower()} {a}{end}"
    sentences = re.findall(r"[^.!?]+[.!?]+", text)
    if len(sentences) == 2 and "".join(sentences).strip() == text.strip():
        return f"{sentences[1].strip()} {sentences[0].strip()}"
    return text


def _led_in(text: str, draw: random.Random) -> str:
    """Words before the text that say nothing."""
    return draw.choice(_BEFORE) + _lower(text)


def _led_out(text: str, draw: random.Random) -> str:
    """Words after the text that say nothing."""
    body = text.rstrip()
    end = body[-1] if body and body[-1] in ".!?" else ""
    return body[: len(body) - len(end)] + draw.choice(_AFTER) + (end or ".")


def _without_fillers(text: str, draw: random.Random) -> str:
    """Words that can be left out, left out."""
    return re.sub(r"\b(really|very|just|so|actually|quite) (?=\w)", "", text)


_RULES = (_contracted, _plain_words, _swapped, _led_in, _led_out, _without_fillers)


def _replaced(text: str, old: str, new: str) -> str:
    def again(found: re.Match[str]) -> str:
        return _upper(new) if found[0][0].isupper() and not new[0].isupper() else new

    return re.sub(rf"\b{re.escape(old)}\b", again, text, flags=re.IGNORECASE)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(text: str) -> str:
    """Small at the beginning, where that is surely no name: a known small word."""
    first = text.split(" ", 1)[0]
    small = {"The", "A", "An", "My", "Our", "We", "It", "There", "This", "That", "When", "You"}
    return text[:1].lower() + text[1:] if first in small else text


def _from_file(path: Path) -> Rephraser:
    told: dict[str, list[str]] = {}
    for number, one in enumerate(load(path), 1):
        record = one if isinstance(one, Record) else Record(one, f"{path}, record {number}")
        told.setdefault(record.text("text"), []).extend(record.texts("rephrasings"))

    def read(texts: Sequence[str], count: int, _: Progress) -> list[list[str]]:
        if not any(text in told for text in texts):
            raise DatasetError(
                f"{path} rephrases none of the {len(texts)} texts, such as {texts[0]!r}; its "
                "'text' must be the same to the letter."
            )
        return [told.get(text, [])[:count] for text in texts]

    return read


class Seq2Seq:
    """An encoder-decoder that writes paraphrases, sampled by a seed of each text's own."""

    def __init__(self, name: str | Path, *, prefix: str = "", seed: int = 0) -> None:
        """Load the model.

        Raises:
            ModelLoadError: there is no such model, or it is no encoder-decoder.
        """
        self.prefix, self.seed = prefix, seed
        where: Any = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(name), **where)
            with no_weights_bar():
                self.network = AutoModelForSeq2SeqLM.from_pretrained(
                    str(name), use_safetensors=True, **where
                ).eval()
        # Parsers and readers below (tokenizers, safetensors, huggingface_hub) raise what they like.
        except Exception as error:
            raise ModelLoadError(
                f"cannot load the rephraser {str(name)!r}: {error}\n"
                f"  Give {RULES!r}, a .jsonl file, or an encoder-decoder's folder or Hub name."
            ) from error

    def __call__(
        self, texts: Sequence[str], count: int, progress: Progress = silent
    ) -> list[list[str]]:
        """Up to `count` different paraphrases of each text."""
        found = []
        for number, text in enumerate(texts, 1):
            found.append(self._one(text, count))
            progress("rephrasing", number, len(texts))
        return found

    @torch.no_grad()
    def _one(self, text: str, count: int) -> list[str]:
        row = self.tokenizer(self.prefix + text, truncation=True, return_tensors="pt")
        with torch.random.fork_rng():
            torch.manual_seed(random.Random(f"rephrase {self.seed} {text}").getrandbits(63))
            written = self.network.generate(
                input_ids=row["input_ids"],
                attention_mask=row["attention_mask"],
                do_sample=True,
                top_p=0.95,
                num_return_sequences=count,
                max_new_tokens=2 * row["input_ids"].shape[1],
            )
        candidates = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return list(dict.fromkeys(c.strip() for c in candidates if c.strip() and c.strip() != text))
