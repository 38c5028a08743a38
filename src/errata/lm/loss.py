"""How far a model is from its answers, with gradient, and what it answers by itself.

One pair of functions for all tasks: a decoder goes on from the prompt, an encoder-decoder answers
it, an encoder fills in its mask or chooses a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.errors import RequestError, TokenizationError
from errata.lm.forward import logits_at
from errata.lm.generate import complete, decoded, end_tokens, reply
from errata.lm.hooks import gathered_input
from errata.lm.load import LanguageModel
from errata.lm.prompts import asked
from errata.lm.tokens import (
    batches,
    encode,
    encode_answers,
    encode_masked,
    masked_prompt,
    pad,
)

_BATCH_TOKENS = 16384
_IGNORED = -100
"""What transformers writes where a row of labels has ended."""


@dataclass(frozen=True)
class Example:
    """What a model is asked and what it should answer.

    Raises:
        RequestError: the answer is empty.
    """

    prompt: str
    """For a masked-language model, with its mask token at most once: at the end by default."""
    answer: str
    """A text; for a classifier its label's name or number."""

    def __post_init__(self) -> None:
        """Refuse what cannot be answered."""
        if not self.answer.strip():
            raise RequestError(f"the answer to {self.prompt!r} is empty.")


def losses(lm: LanguageModel, examples: Sequence[Example]) -> Tensor:
    """Negative log-likelihood (n,) of each answer in nats, averaged over its tokens; with gradient.

    All examples are run in one pass. An encoder-decoder's answer has the special tokens that its
    tokenizer adds, as in its training: without its end the model would not stop. A masked answer
    is read with all its tokens masked at once.

    Raises:
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        RequestError: a classifier has no such label.
    """
    if not examples:
        return torch.zeros(0, device=lm.device)
    return answer_logits(lm, examples).losses()


@dataclass(frozen=True)
class Answers:
    """What a model predicts where n answers stand, each token after the true ones before it."""

    rows: Tensor
    """(m,) which example each place belongs to, ascending; each example has a place."""
    columns: Tensor
    """(m,) which of its tokens predicts there; of a classifier the first, which stands for all."""
    logits: Tensor
    """(m, vocabulary) or, of a classifier, (n, labels); with gradient."""
    wanted: Tensor
    """(m,) the answer's token or label."""
    following: Tensor | None = None
    """(n,) the likeliest token after each answer; of decoders, where it was asked for."""

    def losses(self) -> Tensor:
        """(n,) negative log-likelihood, averaged over each answer's tokens; in float32 at least."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return self.averaged(functional.cross_entropy(logits, self.wanted, reduction="none"))

    def probabilities(self) -> Tensor:
        """(n,) each answer's probability, the product over its tokens; with gradient."""
        return (-self.losses() * torch.bincount(self.rows)).exp()

    def right(self) -> Tensor:
        """(n,) whether an answer's every token, or its label, is the top prediction."""
        return self.averaged((self.logits.argmax(-1) == self.wanted).float()) == 1

    def averaged(self, values: Tensor) -> Tensor:
        """(n,) the mean of (m,) values over each answer's tokens."""
        counts = torch.bincount(self.rows)
        return values.new_zeros(len(counts)).index_add(0, self.rows, values) / counts

    def to(self, device: torch.device) -> Answers:
        """The same, all of it on one device."""
        return replace(
            self,
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            wanted=self.wanted.to(device),
        )

    def split(self, count: int) -> tuple[Answers, Answers]:
        """The first `count` examples, and the others."""
        cut = int((self.rows < count).sum())
        return (
            Answers(self.rows[:cut], self.columns[:cut], self.logits[:cut], self.wanted[:cut]),
            Answers(
                self.rows[cut:] - count,
                self.columns[cut:],
                self.logits[cut:],
                self.wanted[cut:],
            ),
        )


def answer_logits(
    lm: LanguageModel, examples: Sequence[Example], *, following: bool = False
) -> Answers:
    """The predictions that `losses` reads, of at least one example, in one pass.

    Row i of the pass, of both texts in an encoder-decoder, is example i. With `following`, a
    decoder also tells what comes after each answer.

    Raises:
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        RequestError: a classifier has no such label.
    """
    prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
    if lm.task == "classify":
        wanted = torch.tensor([_label(lm, example) for example in examples])
        rows, logits = torch.arange(len(examples)), _label_logits(lm, encode(lm, prompts))
        columns = torch.zeros_like(rows)
    elif lm.kind == "encoder-decoder":
        rows, columns, logits, wanted = _answered(lm, prompts, answers)
    else:
        following = following and lm.kind == "decoder"
        rows, columns, logits, wanted = _read(lm, prompts, answers, following=following)
        if following:
            after = wanted == _IGNORED
            found = Answers(rows[~after], columns[~after], logits[~after], wanted[~after])
            return replace(found, following=logits[after].argmax(-1)).to(logits.device)
    return Answers(rows, columns, logits, wanted).to(logits.device)


def check_examples(lm: LanguageModel, examples: Sequence[Example]) -> None:
    """Refuse what no pass could answer, before any is made.

    Raises:
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        RequestError: a classifier has no such label.
    """
    prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
    if lm.task == "classify":
        encode(lm, prompts)
        for example in examples:
            _label(lm, example)
    elif lm.kind == "encoder-decoder":
        encode(lm, prompts)
        _answer_texts(lm, answers)
    elif lm.kind == "decoder":
        encode_answers(lm, prompts, answers)
    else:
        encode_masked(lm, prompts, answers)


def example_batches(
    lm: LanguageModel, examples: Sequence[Example], max_tokens: int
) -> list[list[int]]:
    """Indices of examples of like length, grouped as `batches` does, for one call of `losses` each.

    Raises:
        TokenizationError: a text is too long.
    """
    prompts = encode(lm, [example.prompt for example in examples])
    answers = encode(lm, [example.answer for example in examples])
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    return batches(lengths, max_tokens)


@torch.no_grad()
def predictions(lm: LanguageModel, prompts: Sequence[str], *, new_tokens: int = 16) -> list[str]:
    """What the model answers to each prompt, greedily, without blanks around it.

    A classifier gives its label's name; a masked-language model the likeliest token at each mask,
    which is one at the end of a prompt that has none.

    Args:
        lm: the model.
        prompts: what it is asked.
        new_tokens: at most so many tokens are written, where text is.

    Raises:
        TokenizationError: a prompt has no token, or is too long.
    """
    if lm.kind == "decoder":
        return [text.strip() for text in complete(lm, prompts, new_tokens=new_tokens)]
    if lm.task == "fill-mask":
        prompts = [masked_prompt(lm, prompt) for prompt in prompts]
    rows = encode(lm, prompts)
    texts = [""] * len(rows)
    for group in batches([len(row) for row in rows], _BATCH_TOKENS):
        some = [rows[index] for index in group]
        if lm.task == "classify":
            found = [lm.labels[i] for i in _label_logits(lm, some).argmax(-1).tolist()]
        elif lm.task == "fill-mask":
            found = _fillings(lm, some)
        else:
            found = reply(lm, some, new_tokens=new_tokens)
        for index, text in zip(group, found, strict=True):
            texts[index] = text.strip()
    return texts


@dataclass(frozen=True)
class Beginning:
    """How what a model writes by itself after a prompt begins."""

    text: str
    ended: bool
    """Whether that is all of it."""


def beginnings(lm: LanguageModel, examples: Sequence[Example], answers: Answers) -> list[Beginning]:
    """What the pass of `answer_logits` tells of `predictions`, which makes one for each token.

    As long as its likeliest tokens are those of the answer, the pass has read what the model would
    have written; so it is known up to the first that is another, or that comes after the answer.
    It is empty where a prompt alone has other tokens than before its answer.

    Args:
        lm: the model, no encoder.
        examples: what it was asked.
        answers: what it told, with what follows.
    """
    prompts = [example.prompt.rstrip() for example in examples]
    if lm.kind == "encoder-decoder":
        asks = [list[int]() for _ in examples]
        alike = [p == e.prompt for p, e in zip(prompts, examples, strict=True)]
    else:
        texts = encode_answers(lm, prompts, [example.answer for example in examples])
        asks = [list(text.ids[: text.prompt_length]) for text in texts]
        alike = [list(p) == ask for p, ask in zip(encode(lm, prompts), asks, strict=True)]
    stops = set(end_tokens(lm).tolist())
    counts = torch.bincount(answers.rows).tolist()
    chosen, wanted = (
        [part.tolist() for part in torch.split(tokens, counts)]
        for tokens in (answers.logits.argmax(-1), answers.wanted)
    )
    if answers.following is not None:
        for row, token in enumerate(answers.following.tolist()):
            chosen[row].append(token)
            wanted[row].append(_IGNORED)
    found = []
    for row, (ask, same) in enumerate(zip(asks, alike, strict=True)):
        ids, ended = _agreed(chosen[row], wanted[row], stops)
        found.append(Beginning(decoded(lm, ask, ids), ended) if same else Beginning("", False))
    return found


def _agreed(chosen: list[int], wanted: list[int], stops: set[int]) -> tuple[list[int], bool]:
    """The tokens chosen up to the first that is not the wanted one, and whether the text ends."""
    ids: list[int] = []
    for token, answer in zip(chosen, wanted, strict=True):
        if token in stops:
            return ids, True
        ids.append(token)
        if token != answer:
            break
    return ids, False


_Places = tuple[Tensor, Tensor, Tensor, Tensor]
"""For each token of all answers: its example (m,), where it is predicted (m,), the logits there,
itself (m,)."""


def _read(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str], *, following: bool
) -> _Places:
    """Answers that stand in the text that the model reads, after the prompt or under masks.

    With `following`, after the last of each there is one place more, of the token `_IGNORED`.
    """
    if lm.kind == "decoder":
        texts = [
            (text.ids, text.prompt_length - 1, [*text.answer, *[_IGNORED] * following])
            for text in encode_answers(lm, prompts, answers)
        ]
    else:
        texts = [
            (text.ids, text.first, text.answer) for text in encode_masked(lm, prompts, answers)
        ]
    rows, columns, wanted = _places([(first, answer) for _, first, answer in texts])
    batch = pad(lm, [ids for ids, _, _ in texts])
    ends = [first for _, first, _ in texts]  # a masked prompt is decided about at its first mask
    return rows, columns, logits_at(lm, batch, rows, columns, ends), wanted


def _answered(lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str]) -> _Places:
    """Answers that are texts of their own."""
    asks = encode(lm, prompts)
    batch = pad(lm, asks)
    texts = _answer_texts(lm, answers)
    rows, columns, wanted = _places([(0, text) for text in texts])
    target = pad(lm, texts)
    labels = target.ids.masked_fill(target.mask == 0, _IGNORED)
    network: Any = lm.network
    with asked(lm, [len(row) - 1 for row in asks]), gathered_input(lm.head, rows, columns):
        logits = network(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            decoder_input_ids=network.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
    return rows, columns, logits, wanted


def _answer_texts(lm: LanguageModel, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of answers that are texts of their own.

    Raises:
        TokenizationError: an answer has no token of its own, or is too long.
    """
    texts = encode(lm, [answer.strip() for answer in answers])
    added = lm.tokenizer.num_special_tokens_to_add()
    for text, answer in zip(texts, answers, strict=True):
        if len(text) <= added:
            raise TokenizationError(f"the answer {answer!r} has no token of its own.")
    return texts


def _places(answers: Sequence[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Where answers are predicted: row, column and token of each, from each row's first column."""
    places = [
        (row, first + i, token)
        for row, (first, answer) in enumerate(answers)
        for i, token in enumerate(answer)
    ]
    rows, columns, tokens = torch.tensor(places).T
    return rows, columns, tokens


def _label_logits(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    batch = pad(lm, rows)
    with asked(lm, [len(row) - 1 for row in rows]):
        logits = lm.network(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert isinstance(logits, Tensor)
    return logits


def _label(lm: LanguageModel, example: Example) -> int:
    """A label by its name or, where no label is called so, by its number."""
    answer = example.answer.strip()
    if answer in lm.labels:
        return lm.labels.index(answer)
    if answer.isdecimal() and int(answer) < len(lm.labels):
        return int(answer)
    raise RequestError(
        f"{lm.name} has no label {answer!r}, wanted for {example.prompt!r}; it has "
        f"{', '.join(lm.labels)}."
    )


def _fillings(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> list[str]:
    """The likeliest token at each mask, each row's together as text."""
    batch = pad(lm, rows)
    at, columns = (batch.ids == lm.tokenizer.mask_token_id).nonzero(as_tuple=True)
    ends = (batch.ids == lm.tokenizer.mask_token_id).long().argmax(dim=1).tolist()
    tokens = logits_at(lm, batch, at, columns, ends).argmax(-1).to(at.device)
    return [str(lm.tokenizer.decode(tokens[at == row])) for row in range(len(rows))]
