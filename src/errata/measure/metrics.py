"""What the papers measure, as functions of numbers and texts: no model in sight.

Notation: NLL(a | p) is the mean negative log-probability of answer a's tokens after prompt p. A
prompt has an answer that is wanted there and a rival. Formulas are those of the reference code of
ROME and MEMIT; every value is averaged within a case first, then over cases.

Intervals are 95%. Where each case says yes or no (a proportion) the interval is Wilson's, which
stays honest at 0 and 1; for other means it is the normal 1.96 std / sqrt(n), unknown (NaN) for a
single case; for harmonic means it is a seeded bootstrap over cases.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from errata.errors import DatasetError

Z95 = 1.959963984540054
"""97.5% quantile of the normal distribution."""


class Estimate(NamedTuple):
    """A mean over n cases with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


def success(answer: ArrayLike, rival: ArrayLike) -> float:
    """Share of prompts where the answer is likelier than its rival: ES, PS, NS.

    Args:
        answer: NLL of the wanted answer for each prompt.
        rival: NLL of the other answer.
    """
    return float(np.mean(np.asarray(answer) < np.asarray(rival)))


def magnitude(answer: ArrayLike, rival: ArrayLike) -> float:
    """Mean of exp(-NLL_answer) - exp(-NLL_rival): EM, PM, NM."""
    return float(np.mean(np.exp(-np.asarray(answer)) - np.exp(-np.asarray(rival))))


def token_accuracy(hits: Sequence[Sequence[bool]]) -> float:
    """Share of all the answers' tokens that are the top prediction under teacher forcing."""
    return float(np.mean([hit for answer in hits for hit in answer]))


def answer_accuracy(hits: Sequence[Sequence[bool]]) -> float:
    """Share of answers whose every token is the top prediction under teacher forcing."""
    return float(np.mean([all(answer) for answer in hits]))


def reads(text: str, answer: str) -> bool:
    """Whether a continuation begins with the answer as whole words ("Romeo" does not say Rome)."""
    return re.match(re.escape(answer.strip()) + r"(?!\w)", text.strip()) is not None


def reads_already(text: str, answer: str, *, ended: bool) -> bool | None:
    """`reads` of a continuation of which this is the beginning; None where that does not tell yet.

    Args:
        text: how it begins.
        answer: what is looked for.
        ended: whether it goes no further.
    """
    if ended:
        return reads(text, answer)
    said, wanted = text.strip(), answer.strip()
    if said.startswith(wanted) and len(said) > len(wanted) and "\ufffd" not in said:
        return reads(said, wanted)
    # Tokenizers take blanks out later, and half of a letter becomes another one.
    bare = ("".join(said.split("\ufffd")[0].split()), "".join(wanted.split()))
    short, long = sorted(bare, key=len)
    return None if long.startswith(short) else False


def fluency(texts: Sequence[str]) -> float:
    """GE: mean over texts of H2 / 3 + 2 H3 / 3, entropies of word bigrams and trigrams in bits.

    Repetitive text has few different n-grams and scores low. The references print 100 times it.
    """
    words = [tokenize(text) for text in texts]
    return float(np.mean([_entropy(w, 2) / 3 + 2 * _entropy(w, 3) / 3 for w in words]))


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def tokenize(text: str) -> list[str]:
    """Words as nltk.word_tokenize finds them, without its downloaded data.

    Sentences are found by the untrained Punkt rules: unlike the trained ones they take the point
    of an abbreviation such as "Dr." for a token of its own.
    """
    sentences, words = _tokenizers()
    return [word for line in sentences.tokenize(text) for word in words.tokenize(line)]


@functools.cache
def _tokenizers() -> tuple[Any, Any]:
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer(), NLTKWordTokenizer()


class Consistency:
    """RS: TF-IDF cosine between what a model writes and texts about what has the new target.

    The papers' idf values come from Wikipedia snippets in files of their own. Those are not needed
    here: idf is fitted on the references that are given, so RS compares models scored with the
    same references, not with the papers' tables.

    Raises:
        DatasetError: the references hold no word.
    """

    def __init__(self, corpus: Sequence[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            self._vectorizer = TfidfVectorizer().fit(corpus)
        except ValueError as error:
            raise DatasetError(f"the reference texts cannot be compared with: {error}.") from error

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> float:
        """The cosine, from 0 (no word in common) to 1; texts on either side are joined."""
        written, true = self._vectorizer.transform([" ".join(texts), " ".join(references)])
        return float((written @ true.T).toarray().item())  # rows have norm 1, or 0 without words


def interval(values: ArrayLike, *, within: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """Mean over cases: Wilson's interval for yes-or-no values, otherwise the normal one.

    Args:
        values: one for each case.
        within: what values are possible; the interval is cut off there.
    """
    x = np.asarray(values, dtype=float)
    n, mean = len(x), float(x.mean())
    if np.isin(x, (0, 1)).all():
        centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + (Z95 / (2 * n)) ** 2)
        # At 0 and 1 the interval ends there exactly; floating point would miss by 1e-16.
        low, high = (centre - half if mean > 0 else 0.0), (centre + half if mean < 1 else 1.0)
        return Estimate(mean, low, high, n)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, n)
    half = Z95 * float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, max(within[0], mean - half), min(within[1], mean + half), n)


def harmonic_interval(columns: ArrayLike, *, seed: int, resamples: int = 1000) -> Estimate:
    """Harmonic mean of the columns' means, with a percentile bootstrap over rows.

    Args:
        columns: (n, k), a row for each case, a column for each score; NaN where a case has none.
        seed: of the resampling.
        resamples: how many times n cases are drawn with replacement.
    """
    x = np.asarray(columns, dtype=float)
    n, mean = len(x), float(_harmonic(x[None])[0])
    if n == 1:
        return Estimate(mean, math.nan, math.nan, n)
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = np.nanquantile(_harmonic(x[draws]), (0.025, 0.975))
    return Estimate(mean, float(low), float(high), n)


def _harmonic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(b, n, k) -> (b,), the harmonic mean of b tables' column means; NaN for an empty column."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.nansum(x, axis=1) / (~np.isnan(x)).sum(axis=1)
        return np.asarray(x.shape[-1] / (1 / means).sum(axis=-1))
