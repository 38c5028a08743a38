"""WikiText (Merity et al. 2016): go on from a passage as its article does.

MEND's form of generation (Mitchell et al. 2022): the edit is a continuation of `CONTINUATION`
words, after the words before it; the paraphrases are the same passage with its beginning cut off;
the neighbour is another passage with its own continuation. MEND draws the continuation from a
model, here it is the article's own. The published token form is turned back into ordinary text;
passages with `<unk>` are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from errata.errors import DatasetError
from errata.measure.datasets import hub
from errata.measure.datasets.records import load
from errata.requests import Case, Probe, Request

PASSAGE = 40
"""Words before a continuation."""
CONTINUATION = 10
"""Words of a continuation."""
SHORTER = (30, 20)
"""Words before it in the paraphrases."""

_GLUED = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$]) "), r"\1"),
    (re.compile(r" (n't|'s|'re|'ve|'ll|'d|'m)\b"), r"\1"),
    (re.compile(r" – (?=\d)"), "–"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
)


def read(source: Path | str, limit: int | None = None) -> list[Case]:
    """The first `limit` cases of a file of text, or of a data set on the Hub.

    Raises:
        DatasetError: the file cannot be read or has no passage that is long enough.
    """
    if str(source).startswith(hub.PREFIX):
        lines = [str(row.get("text", "")) for row in load(source)]
    else:
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"cannot read {source}: {error}") from error
    return continuations(lines, limit, source=str(source))


def continuations(lines: Iterable[str], limit: int | None = None, *, source: str) -> list[Case]:
    """The first `limit` cases of paragraphs, a line each, of which short ones are passed over.

    Raises:
        DatasetError: fewer than two are long enough; `source` is what the message calls them.
    """
    passages = list(islice(_passages(lines), None if limit is None else limit + 1))
    if len(passages) < 2:
        raise DatasetError(
            f"{source} has {len(passages)} passages of {PASSAGE + CONTINUATION} words without "
            "<unk>; at least two are needed."
        )
    pairs = zip(passages, [*passages[1:], passages[0]], strict=True)
    return [_case(number, *two) for number, two in enumerate(pairs)][:limit]


def plain(line: str) -> str:
    """A line of the token form as ordinary text."""
    text = " ".join(line.split())
    for pattern, replacement in _GLUED:
        text = pattern.sub(replacement, text)
    return text


def _passages(lines: Iterable[str]) -> Iterator[list[str]]:
    """The first words of each paragraph that is long enough; headings are none."""
    for line in lines:
        words = plain(line).split(" ")[: PASSAGE + CONTINUATION]
        if len(words) == PASSAGE + CONTINUATION and words[0] != "=":
            text = " ".join(words)
            if "<unk>" not in text and "{}" not in text:
                yield words


def _case(number: int, passage: list[str], other: list[str]) -> Case:
    before, target = passage[:PASSAGE], " ".join(passage[PASSAGE:])
    return Case(
        request=Request("{}", " ".join(before), target),
        case_id=str(number),
        paraphrases=tuple(" ".join(before[-count:]) for count in SHORTER),
        neighbours=(Probe(" ".join(other[:PASSAGE]), " ".join(other[PASSAGE:])),),
    )
