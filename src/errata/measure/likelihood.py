"""How likely answers are after prompts, for thousands of pairs at the cost of few passes.

Attention looks only backwards, so one row of tokens answers for every pair whose tokens it begins
with: equal pairs of different cases, a prompt's one-token targets, and a one-token target beside
a longer one all share a row. Rows of like length are batched, and the head sees only the positions
that are scored, each once. Beside a memory, which may read a row by its prompt, only pairs of one
prompt share a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from errata.errors import NotFiniteError, TokenizationError
from errata.lm.forward import logits_at
from errata.lm.load import LanguageModel
from errata.lm.tokens import Encoded, encode_answers, pad
from errata.progress import Progress, silent

Pair = tuple[str, str]
"""A prompt and an answer, joined by one space."""


@dataclass(frozen=True)
class Answer:
    """An answer's tokens after its prompt, each predicted from the true tokens before it."""

    logprobs: tuple[float, ...]
    hits: tuple[bool, ...]
    """Whether each token is the model's top prediction."""

    @property
    def nll(self) -> float:
        """Mean negative log-probability of a token."""
        return -sum(self.logprobs) / len(self.logprobs)


@torch.no_grad()
def judge(
    lm: LanguageModel,
    pairs: Iterable[Pair],
    *,
    batch_tokens: int = 2048,
    progress: Progress = silent,
) -> dict[Pair, Answer]:
    """Teacher-forced log-probabilities of every (prompt, answer) pair, each computed once.

    Args:
        lm: the model, edited or not.
        pairs: prompts and answers; repeated ones cost nothing.
        batch_tokens: at most so many tokens, padding included, in one forward pass.
        progress: called with rows done.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
        TokenizationError: a prompt or answer has no token, or a pair is too long for the model.
    """
    unique = list(dict.fromkeys(pairs))
    encoded = encode_answers(lm, [prompt for prompt, _ in unique], [answer for _, answer in unique])
    for (prompt, _), entry in zip(unique, encoded, strict=True):
        if not entry.prompt_length:
            raise TokenizationError(f"the prompt {prompt!r} has no token that could be continued.")
    owners = [tuple(e.ids[: e.prompt_length]) if lm.memories else () for e in encoded]
    rows, row_of = _shared_rows([tuple(entry.ids[:-1]) for entry in encoded], owners)
    members: list[list[int]] = [[] for _ in rows]
    for index, row in enumerate(row_of):
        members[row].append(index)
    judged: dict[Pair, Answer] = {}
    done = 0
    for group in _batches([len(row) for row in rows], batch_tokens):
        inside = [(place, index) for place, row in enumerate(group) for index in members[row]]
        scored = _score(lm, [rows[row] for row in group], [(p, encoded[i]) for p, i in inside])
        judged |= {unique[i]: answer for (_, i), answer in zip(inside, scored, strict=True)}
        done += len(group)
        progress("probabilities", done, len(rows))
    return judged


def _shared_rows(
    sequences: Sequence[tuple[int, ...]], owners: Sequence[tuple[int, ...]]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The sequences that begin no other one, and which of these stands for each sequence.

    Only sequences of one owner stand for each other. Among these, in sorted order, a sequence that
    begins any other begins its successor.
    """
    rows: list[tuple[int, ...]] = []
    row_of = [0] * len(sequences)
    keys = list(zip(owners, sequences, strict=True))
    owner: tuple[int, ...] = ()
    for index in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
        sequence = sequences[index]
        if not rows or owners[index] != owner or rows[-1][: len(sequence)] != sequence:
            rows.append(sequence)
            owner = owners[index]
        row_of[index] = len(rows) - 1
    return rows, row_of


def _batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of like length, at most `max_tokens` in a batch and a sixteenth of that in padding."""
    groups: list[list[int]] = []
    waste = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[groups[-1][0]] if groups else 0
        waste += longest - lengths[index]
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens and waste <= max_tokens // 16:
            groups[-1].append(index)
        else:
            groups.append([index])
            waste = 0
    return groups


def _score(
    lm: LanguageModel, rows: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, Encoded]]
) -> list[Answer]:
    """Score answers, each in the given row, in one forward pass."""
    places = [
        (row, column) for row, a in answers for column in range(a.prompt_length - 1, len(a.ids) - 1)
    ]
    place_of = {place: number for number, place in enumerate(dict.fromkeys(places))}
    where = torch.tensor(list(place_of))
    ends = [0] * len(rows)
    for row, answer in answers:
        ends[row] = answer.prompt_length - 1  # where pairs of several prompts share it: any of them
    logits = logits_at(lm, pad(lm, rows), where[:, 0], where[:, 1], ends).float()
    pick = torch.tensor([place_of[place] for place in places], device=logits.device)
    wanted = torch.tensor([token for _, a in answers for token in a.answer], device=logits.device)
    logprobs = logits[pick, wanted] - logits.logsumexp(-1)[pick]
    if not logprobs.isfinite().all():
        raise not_finite(lm)
    hits = logits.argmax(-1)[pick] == wanted
    each = iter(zip(logprobs.tolist(), hits.tolist(), strict=True))
    return [Answer(*zip(*(next(each) for _ in a.answer), strict=True)) for _, a in answers]


def not_finite(lm: LanguageModel) -> NotFiniteError:
    """The error to raise where a model gives no probabilities."""
    return NotFiniteError(
        f"{lm.name} gives probabilities that are not finite: its weights, or an edit on them, "
        "hold NaN or infinity, or its dtype overflows (try float32 or bfloat16)."
    )
