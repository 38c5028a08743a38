"""Text from a model: continuations, answers, and the random prefixes of ROME and MEMIT."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from errata.errors import NotFiniteError, TokenizationError
from errata.lm.forward import logits_at
from errata.lm.hooks import gathered_input
from errata.lm.load import LanguageModel
from errata.lm.noise import NOISE, Hidden, Noise, subjects_hidden
from errata.lm.prompts import asked
from errata.lm.tokens import encode, encode_requests, pad
from errata.requests import Request

_PREFIX_STARTS = ("The", "Therefore", "Because", "I", "You")
"""How MEMIT's random prefixes begin (METHODS 0.3)."""
_BRACES = str.maketrans("{}", "  ")


@torch.no_grad()
def complete(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    top_k: int = 0,
    seed: int = 0,
    total_tokens: bool = False,
    batch_rows: int = 64,
) -> list[str]:
    """What the model writes after each prompt (without the prompt).

    The model alone decides: what a checkpoint's generation_config.json says (temperature,
    repetition penalty ...) is left aside, only its end-of-text tokens are heeded. The global random
    state is neither read nor changed.

    Args:
        lm: the model.
        prompts: where to begin.
        new_tokens: at most so many tokens are written.
        top_k: sample among the k likeliest tokens; 0 takes the likeliest (greedy).
        seed: of the sampling.
        total_tokens: let `new_tokens` count the prompt's tokens too, as the CounterFact metrics do;
            a prompt that is as long already is continued by nothing.
        batch_rows: prompts written at the same time.

    Raises:
        TokenizationError: a prompt has no token, or fills the model's whole length.
        NotFiniteError: the model's weights, or an edit on them, hold NaN.
        ConfigError: the model is not a decoder.
    """
    lm.require_decoder("going on from a text")
    rows = encode(lm, prompts)
    texts = [""] * len(rows)
    for index, row in enumerate(rows):
        if not row:
            raise TokenizationError(f"the prompt {prompts[index]!r} has no token to go on from.")
        if len(row) >= lm.max_length:
            raise TokenizationError(
                f"the prompt {prompts[index][:60]!r}... has {len(row)} tokens and leaves no room "
                f"for text: {lm.name} reads {lm.max_length}."
            )
    generator = torch.Generator(device=lm.device).manual_seed(seed)
    for group in _groups(lm, [len(row) for row in rows], batch_rows):
        limits = [new_tokens if total_tokens else len(rows[i]) + new_tokens for i in group]
        limits = [min(limit, lm.max_length) for limit in limits]
        written = _write(lm, [rows[i] for i in group], limits, top_k, generator)
        for i, ids in zip(group, written, strict=True):
            texts[i] = decoded(lm, rows[i], ids)
    return texts


@torch.no_grad()
def complete_hidden(
    lm: LanguageModel, requests: Sequence[Request], *, new_tokens: int, noise: Noise = NOISE
) -> list[str]:
    """What the model writes, greedily, after each prompt while noise hides its subject.

    Args:
        lm: the model, a decoder.
        requests: prompts with subjects; their variants play no part.
        new_tokens: at most so many tokens are written.
        noise: its first sample is taken.

    Raises:
        TokenizationError: a subject has no token of its own, or a text is too long.
        NotFiniteError: the model's weights, or an edit on them, hold NaN.
        ConfigError: the model is not a decoder.
    """
    lm.require_decoder("going on from a text")
    rows = encode_requests(lm, requests, target=False)
    stops = set(end_tokens(lm).tolist())
    texts = []
    for request, row in zip(requests, rows, strict=True):
        veil = Hidden.of(lm, request, row, noise=noise)
        ids, first, end = list(row.ids), torch.tensor([0]), len(row.ids) - 1
        while len(ids) < min(len(row.ids) + new_tokens, lm.max_length) and ids[-1] not in stops:
            # Without a cache: the noise stands where the pass begins at the first token.
            with subjects_hidden(lm, [veil]):
                last = torch.tensor([len(ids) - 1])
                logits = logits_at(lm, pad(lm, [ids]), first, last, [end])
            _check(lm, logits)
            ids.append(int(logits.argmax()))
        texts.append(decoded(lm, row.ids, _until(ids[len(row.ids) :], stops)))
    return texts


@torch.no_grad()
def reply(lm: LanguageModel, rows: Sequence[Sequence[int]], *, new_tokens: int) -> list[str]:
    """What an encoder-decoder answers to rows of token ids, the likeliest token each time.

    As in `complete`, the model alone decides.

    Raises:
        NotFiniteError: the model's weights, or an edit on them, hold NaN.
    """
    assert lm.kind == "encoder-decoder"
    network: Any = lm.network
    batch, ends = pad(lm, rows), end_tokens(lm)
    ids = batch.ids.new_full((len(rows), 1), lm.config.decoder_start_token_id)
    text, cache = ids[:, 1:], None
    going = torch.ones(len(rows), dtype=torch.bool, device=lm.device)
    with asked(lm, [len(row) - 1 for row in rows]) as prompts:
        read = network.get_encoder()(input_ids=batch.ids, attention_mask=batch.mask)
        while going.any() and text.shape[1] < min(new_tokens, lm.max_length):
            said = network(
                encoder_outputs=read,
                attention_mask=batch.mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
            logits, cache = said.logits[:, -1].to(lm.device), said.past_key_values
            _check(lm, logits)
            ids = logits.argmax(dim=1, keepdim=True)
            text = torch.cat([text, ids], dim=1)
            prompts.start = text.shape[1]
            going = going & ~torch.isin(ids[:, 0], ends)
    stops = set(ends.tolist())
    return lm.tokenizer.batch_decode(
        [_until(ids, stops) for ids in text.tolist()], skip_special_tokens=True
    )


def random_prefixes(lm: LanguageModel, *, count: int, length: int, seed: int) -> list[str]:
    """`count` beginnings sampled from the model itself, each ready to stand before a prompt.

    MEMIT's rule (METHODS 0.3): five first words in turn, at most `length` tokens in all, top-k 5,
    braces become blanks, ". " at the end; seeded here. An empty prefix is not among them.
    """
    starts = [_PREFIX_STARTS[i % len(_PREFIX_STARTS)] for i in range(count)]
    written = complete(lm, starts, new_tokens=length, top_k=5, seed=seed, total_tokens=True)
    texts = [
        " ".join((start + text).translate(_BRACES).split())
        for start, text in zip(starts, written, strict=True)
    ]
    return [text.rstrip(". ") + ". " for text in texts]


def _write(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    top_k: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """New tokens after each row, up to its limit in all or its end of text.

    All rows begin at the shortest one's length; where a row's prompt goes on, its own token is
    taken instead of a new one. So nothing is padded, in any family, and no time is lost as long as
    the rows are of like length. (Where a memory has to see the whole prompt at once, they are of
    the same length: see `_groups`.)
    """
    ends = end_tokens(lm)
    stops = set(ends.tolist())
    device = lm.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    prompts = pad(lm, rows).ids
    ids = prompts[:, : int(lengths.min())]
    cache = DynamicCache(config=lm.config)
    every = torch.arange(len(rows))
    limit = torch.tensor(limits, device=device)
    going = lengths < limit
    text = ids
    with asked(lm, lengths - 1) as known:
        while going.any():
            with gathered_input(lm.head, every, torch.full_like(every, ids.shape[1] - 1)):
                logits = lm.network(
                    input_ids=ids,
                    attention_mask=torch.ones_like(text),
                    past_key_values=cache,
                    use_cache=True,
                ).logits.to(device)
            _check(lm, logits)
            ids = _chosen(logits, top_k, generator)
            known.start = place = text.shape[1]
            given = lengths > place
            if place < prompts.shape[1]:
                ids = torch.where(given[:, None], prompts[:, place : place + 1], ids)
            text = torch.cat([text, ids], dim=1)
            going = going & (given | ~torch.isin(ids[:, 0], ends)) & (limit > place + 1)
    written = []
    for row, whole, most in zip(rows, text.tolist(), limits, strict=True):
        written.append(_until(whole[len(row) : most], stops))
    return written


def _groups(lm: LanguageModel, lengths: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Rows that are written together: of like length or, beside a memory, of the same length.

    A memory decides at a prompt's last token what holds for all of its tokens.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    for index in order:
        full = not groups or len(groups[-1]) == batch_rows
        if full or (lm.memories and lengths[groups[-1][0]] != lengths[index]):
            groups.append([])
        groups[-1].append(index)
    return groups


def _check(lm: LanguageModel, logits: Tensor) -> None:
    if logits.isnan().any():
        raise NotFiniteError(
            f"{lm.name} gives probabilities that are not finite: its weights, or an edit on "
            "them, hold NaN or infinity, or its dtype overflows (try float32 or bfloat16)."
        )


def _until(ids: list[int], stops: Collection[int]) -> list[int]:
    """What stands before the first token that ends a text."""
    return ids[: next((i for i, id_ in enumerate(ids) if id_ in stops), None)]


def _chosen(logits: Tensor, top_k: int, generator: torch.Generator) -> Tensor:
    """(n, 1) the likeliest tokens, or tokens drawn among the k likeliest."""
    if not top_k:
        return logits.argmax(dim=1, keepdim=True)
    likeliest = logits.float().topk(min(top_k, logits.shape[1]), dim=1)
    drawn = torch.multinomial(likeliest.values.softmax(dim=1), 1, generator=generator)
    return likeliest.indices.gather(1, drawn)


def end_tokens(lm: LanguageModel) -> Tensor:
    """The tokens that end a text: the tokenizer's, and what the checkpoint names besides."""
    ends = {lm.tokenizer.eos_token_id}
    configured = getattr(lm.network.generation_config, "eos_token_id", None)
    ends.update(configured if isinstance(configured, list) else [configured])
    return torch.tensor(sorted(ends - {None}), dtype=torch.long, device=lm.device)


def decoded(lm: LanguageModel, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What `ids` add to the prompt's text; alone, some decoders would drop their first blank."""

    def decode(tokens: Sequence[int]) -> str:
        return str(lm.tokenizer.decode(list(tokens), skip_special_tokens=True))

    before, whole = decode(prompt), decode([*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else decode(ids)
