"""How alike two texts are, as an encoder sees them: what rephrasings are filtered by.

``sentence``: the cosine of the two texts' mean states. ``bertscore``: BERTScore's F1 (Zhang et al.
2020) without its weights and rescaling. With s_ij the cosine of token i's and token j's states,

    P = mean_i max_j s_ij    R = mean_j max_i s_ij    F1 = 2 P R / (P + R)

over the tokens of the candidate (i) and of the reference (j), special ones left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from errata.errors import ConfigError
from errata.lm.sentences import SentenceEncoder

Measure = Literal["sentence", "bertscore"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


def similarities(
    encoder: SentenceEncoder,
    candidates: Sequence[str],
    references: Sequence[str],
    measure: Measure = "sentence",
) -> list[float]:
    """How alike each candidate and its reference are; 1 for the same text.

    Raises:
        ConfigError: there is no such measure.
        NotFiniteError: the encoder gives NaN or infinity.
    """
    if measure not in MEASURES:
        raise ConfigError(f"similarity is measured by {' or '.join(MEASURES)}, not {measure!r}.")
    if not candidates:
        return []
    return _MEASURED[measure](encoder, candidates, references)


def bert_score(candidate: Tensor, reference: Tensor) -> float:
    """F1 of token states of length 1, (m, width) and (n, width); 0 where either has no token."""
    if not len(candidate) or not len(reference):
        return 0.0
    cosines = candidate @ reference.mT
    precision = float(cosines.max(dim=1).values.mean())
    recall = float(cosines.max(dim=0).values.mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _sentence(
    encoder: SentenceEncoder, candidates: Sequence[str], references: Sequence[str]
) -> list[float]:
    vectors = encoder([*candidates, *references])
    count = len(candidates)
    return [float(value) for value in (vectors[:count] * vectors[count:]).sum(dim=1)]


def _by_tokens(
    encoder: SentenceEncoder, candidates: Sequence[str], references: Sequence[str]
) -> list[float]:
    states = encoder.tokens([*candidates, *references])
    count = len(candidates)
    return [bert_score(*two) for two in zip(states[:count], states[count:], strict=True)]


_MEASURED: Mapping[
    Measure, Callable[[SentenceEncoder, Sequence[str], Sequence[str]], list[float]]
] = {"sentence": _sentence, "bertscore": _by_tokens}
