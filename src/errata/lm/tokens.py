"""From texts to tokens: where the subject ends, where the target begins, and batches.

Positions come from the fast tokenizer's character offsets on the *filled* text, tokenised as a
whole, so they hold with or without BOS, for any subject position and any vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.errors import TokenizationError
from errata.lm.load import LanguageModel
from errata.requests import Request


@dataclass(frozen=True)
class Encoded:
    """One prompt, with or without an answer, as token ids."""

    ids: list[int]
    prompt_length: int
    """How many tokens stand before the answer; `ids[prompt_length:]` is the answer."""
    subject_first: int = -1
    subject_last: int = -1

    @property
    def answer(self) -> list[int]:
        """The answer's token ids."""
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class Masked:
    """A text with masks in the place of an answer, as token ids."""

    ids: list[int]
    first: int
    """Where the first mask stands; the others follow."""
    answer: list[int]
    """The tokens under the masks."""


@dataclass(frozen=True)
class Batch:
    """Padded token ids (n, t) and their mask (n, t; 1 where a token is real)."""

    ids: Tensor
    mask: Tensor


def encode(lm: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, special tokens around them as the tokenizer adds them.

    What it adds at the end is left out for decoders, which would take it for the text's end.

    Raises:
        TokenizationError: a text is longer than the model can read.
    """
    return [encoded.ids for encoded in _encode(lm, texts, [len(text) for text in texts])]


def encode_answers(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str]
) -> list[Encoded]:
    """Each prompt followed by its answer, one space between them; for decoders.

    Raises:
        TokenizationError: a prompt or answer has no token of its own, or a text is too long.
        ConfigError: the model is not a decoder.
    """
    lm.require_decoder("an answer that follows its prompt")
    texts, lengths = _joined(prompts, answers)
    encoded = _encode(lm, texts, lengths)
    for text, answer, row in zip(texts, answers, encoded, strict=True):
        if not row.answer or not answer.strip():
            raise TokenizationError(f"the answer in {text!r} has no token of its own.")
        if not row.prompt_length:
            raise TokenizationError(f"the prompt of {text!r} has no token that could be continued.")
    return encoded


def encode_masked(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str]
) -> list[Masked]:
    """Each prompt with as many masks as its answer has tokens: in the place of its one mask.

    A prompt without a mask is followed by a space and the answer's. The text is tokenised with the
    answer in it, so blanks and word pieces are those of ordinary text.

    Raises:
        TokenizationError: there are several masks or no mask token at all, the answer has no token
            of its own, or a text is too long.
    """
    mask, texts, starts, stops = mask_token(lm), [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        before, *after = masked_prompt(lm, prompt).split(mask)
        if len(after) != 1:
            raise TokenizationError(f"{prompt!r} has {len(after)} masks {mask}; it may have one.")
        texts.append(before + answer.strip() + after[0])
        stops.append(len(before + answer.strip()))
        starts.append(len(before.rstrip(" ")))  # some tokens are the blank before a word
    masked = []
    for text, start, stop, tokens in zip(texts, starts, stops, _tokenised(lm, texts), strict=True):
        inside = tokens.inside(start, stop)
        if not inside:
            raise TokenizationError(f"the answer in {text!r} has no token of its own.")
        first, last = inside[0], inside[-1]
        around = text[tokens.offsets[first][0] : start] + text[stop : tokens.offsets[last][1]]
        if around.strip():
            raise TokenizationError(
                f"in {text!r} one token belongs to both the answer and what stands beside it; "
                "put the mask between whole words."
            )
        ids = list(tokens.ids)
        ids[first : last + 1] = [lm.tokenizer.mask_token_id] * (last + 1 - first)
        masked.append(Masked(ids, first, tokens.ids[first : last + 1]))
    return masked


def mask_token(lm: LanguageModel) -> str:
    """How a text writes what the model shall fill in.

    Raises:
        TokenizationError: the tokenizer has no mask, or none that the model knows.
    """
    if lm.tokenizer.mask_token is None or lm.tokenizer.mask_token_id >= lm.vocabulary:
        raise TokenizationError(
            f"the tokenizer of {lm.name} has no mask token that the model knows, and an encoder "
            "fills in nothing else. Set its mask_token."
        )
    return str(lm.tokenizer.mask_token)


def masked_prompt(lm: LanguageModel, prompt: str) -> str:
    """The prompt, with a mask at its end if it has none."""
    mask = mask_token(lm)
    return prompt if mask in prompt else f"{prompt.rstrip(' ')} {mask}"


def encode_requests(
    lm: LanguageModel, requests: Sequence[Request], *, prefix: str = "", target: bool = True
) -> list[Encoded]:
    """Each request's filled prompt after `prefix`, followed by its target if asked for.

    Blanks at the prompt's end are dropped in either case; one stands before the target.

    Raises:
        TokenizationError: a subject or target has no token of its own, or a text is too long.
        ConfigError: a target is asked for, and the model is not a decoder.
    """
    prompts = [prefix + request.text for request in requests]
    if target:
        lm.require_decoder("a target that follows its prompt")
        texts, lengths = _joined(prompts, [request.target for request in requests])
    else:
        texts = [prompt.rstrip(" ") for prompt in prompts]
        lengths = [len(text) for text in texts]
    spans = [
        _visible(text, *r.span, len(prefix)) for text, r in zip(prompts, requests, strict=True)
    ]
    encoded = _encode(lm, texts, lengths, spans)
    for request, row in zip(requests, encoded, strict=True):
        if row.subject_last < 0 or row.subject_last >= row.prompt_length:
            raise TokenizationError(
                f"no token of {prefix + request.text!r} belongs to the subject {request.subject!r}."
            )
        if target and not row.answer:
            raise TokenizationError(f"the target {request.target!r} has no token of its own.")
    return encoded


def pad(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Batch:
    """Right-pad rows of ids to one length, on the model's device."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), lm.pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.as_tensor(row)
        mask[index, : len(row)] = 1
    return Batch(ids.to(lm.device), mask.to(lm.device))


def batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest row, holds at most `max_tokens`.

    Rows of like length stand together; a row longer than `max_tokens` gets a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _visible(text: str, start: int, end: int, offset: int) -> tuple[int, int]:
    """A subject's characters in `text`, without blanks around it: they go to other tokens."""
    subject = text[start + offset : end + offset]
    start = start + offset + len(subject) - len(subject.lstrip())
    return start, start + len(subject.strip())


def _joined(prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[str], list[int]]:
    """Texts `prompt + " " + answer`, and how many characters of each are the prompt's."""
    stripped = [prompt.rstrip(" ") for prompt in prompts]
    texts = [f"{prompt} {answer.strip()}" for prompt, answer in zip(stripped, answers, strict=True)]
    return texts, [len(prompt) for prompt in stripped]


@dataclass(frozen=True)
class _Tokens:
    """One text as the tokenizer sees it."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    special: list[bool]

    def inside(self, start: int, stop: int) -> list[int]:
        """The positions of the tokens that hold characters `start` to `stop`."""
        return [
            i
            for i, (begins, ends) in enumerate(self.offsets)
            if not self.special[i] and begins < stop and ends > start
        ]


def _tokenised(lm: LanguageModel, texts: Sequence[str]) -> list[_Tokens]:
    if not texts:
        return []
    tokens = lm.tokenizer(
        list(texts),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # what is too long for the model is refused below
    )
    found = []
    for index, text in enumerate(texts):
        ids, special = list(tokens["input_ids"][index]), tokens["special_tokens_mask"][index]
        end = len(ids)
        # An EOS at the end would answer for a decoder; the others have learnt to expect theirs.
        while lm.kind == "decoder" and end > 1 and special[end - 1]:
            end -= 1
        if end and max(ids[:end]) >= lm.vocabulary:
            raise TokenizationError(
                f"{text[:60]!r} has a token that {lm.name} cannot read (number {max(ids[:end])} of "
                f"{lm.vocabulary}): this tokenizer belongs to another model."
            )
        if end > lm.max_length:
            raise TokenizationError(
                f"a text of {end} tokens is longer than {lm.name} can read ({lm.max_length}): "
                f"{text[:60]!r}... Shorten the prompt or the target."
            )
        offsets = tokens["offset_mapping"][index]
        found.append(_Tokens(ids[:end], offsets[:end], [bool(one) for one in special[:end]]))
    return found


def _encode(
    lm: LanguageModel,
    texts: Sequence[str],
    prompt_ends: Sequence[int],
    spans: Sequence[tuple[int, int]] | None = None,
) -> list[Encoded]:
    encoded = []
    for index, tokens in enumerate(_tokenised(lm, texts)):
        edge = prompt_ends[index]
        length = 0
        for special, (begins, ends) in zip(tokens.special, tokens.offsets, strict=True):
            if special or begins < edge or ends <= edge:
                length += 1
                if ends > edge + 1:  # more than the blank after the prompt
                    raise TokenizationError(
                        f"in {texts[index]!r} one token belongs to both the prompt and what "
                        "follows it; end the prompt with a whole word."
                    )
        inside = tokens.inside(*spans[index]) if spans is not None else []
        first, last = (inside[0], inside[-1]) if inside else (-1, -1)
        encoded.append(Encoded(tokens.ids, length, first, last))
    return encoded
