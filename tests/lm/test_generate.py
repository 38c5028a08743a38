from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from errata.errors import NotFiniteError, TokenizationError
from errata.lm.generate import complete, random_prefixes
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode, encode_requests
from errata.lm.weights import weight_out_in
from errata.requests import Request
from tests.lm.families import VARIANTS, decode, tiny_lm

PROMPTS = ("The capital of France is", "Rome", "The sea. I", "Paris", "Who wrote the letters of")


@torch.no_grad()
def plain_greedy(lm: LanguageModel, prompt: str, new_tokens: int) -> list[int]:
    """One token at a time, without a cache."""
    (ids,) = encode(lm, [prompt])
    start = len(ids)
    for _ in range(new_tokens):
        token = int(
            lm.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
        )
        if token == lm.tokenizer.eos_token_id:
            break
        ids = [*ids, token]
    return ids[start:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_a_plain_loop(variant: str) -> None:
    lm = tiny_lm(variant)
    told = complete(lm, PROMPTS, new_tokens=8, batch_rows=2)
    assert told == [decode(lm, plain_greedy(lm, prompt, 8)) for prompt in PROMPTS]
    assert any(told)


def test_a_checkpoints_generation_habits_are_left_aside() -> None:
    lm = tiny_lm()
    plain = complete(lm, PROMPTS, new_tokens=8)
    lm.network.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        repetition_penalty=5.0,
        max_length=3,
        no_repeat_ngram_size=1,
    )
    assert complete(lm, PROMPTS, new_tokens=8) == plain


def test_sampling_is_seeded_and_touches_no_global_state() -> None:
    lm = tiny_lm()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    once = complete(lm, PROMPTS, new_tokens=8, top_k=5, seed=3)
    torch.rand(7)
    again = complete(lm, PROMPTS, new_tokens=8, top_k=5, seed=3)
    assert once == again
    assert once != complete(lm, PROMPTS, new_tokens=8, top_k=5, seed=4)
    torch.set_rng_state(states[0])
    complete(lm, PROMPTS, new_tokens=5, top_k=5, seed=9)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])


def test_one_prompt_many_times_gives_many_texts() -> None:
    lm = tiny_lm()
    texts = complete(lm, ["The sea"] * 6, new_tokens=8, top_k=5, seed=0, batch_rows=2)
    assert len(set(texts)) == 6


def test_top_one_is_greedy_and_top_all_is_allowed() -> None:
    lm = tiny_lm()
    assert complete(lm, PROMPTS, new_tokens=8, top_k=1) == complete(lm, PROMPTS, new_tokens=8)
    complete(lm, PROMPTS, new_tokens=3, top_k=10_000)


def test_total_tokens_count_the_prompt() -> None:
    lm = tiny_lm()
    (length,) = map(len, encode(lm, PROMPTS[:1]))
    total = complete(lm, PROMPTS[:1], new_tokens=length + 4, total_tokens=True)
    assert total == complete(lm, PROMPTS[:1], new_tokens=4)
    assert complete(lm, PROMPTS[:1], new_tokens=length, total_tokens=True) == [""]


def test_text_ends_at_the_end_of_text() -> None:
    """The tokenizer's, and any other that the checkpoint names."""
    lm = tiny_lm()
    ids = plain_greedy(lm, PROMPTS[0], 8)
    end = next(token for token in ids if token != ids[0])
    config = lm.network.generation_config
    assert config is not None
    config.eos_token_id = [1, end]
    before = decode(lm, ids[: ids.index(end)])
    assert before
    assert complete(lm, PROMPTS[:1] * 2, new_tokens=8) == [before] * 2


@pytest.mark.parametrize("kind", ["bytes-bos", "bytes-eos", "metaspace", "llama2"])
def test_prompt_and_continuation_join_to_the_whole(kind: str) -> None:
    """Decoders of the SentencePiece kind drop the blank before a text's first word."""
    lm = tiny_lm(kind=kind)
    for prompt, told in zip(PROMPTS, complete(lm, PROMPTS, new_tokens=6), strict=True):
        (ids,) = encode(lm, [prompt])
        with torch.no_grad():
            for _ in range(6):
                logits = lm.network(input_ids=torch.tensor([ids])).logits
                ids = [*ids, int(logits[0, -1].argmax())]
                if ids[-1] == lm.tokenizer.eos_token_id:
                    break
        assert prompt + told == decode(lm, ids)


def test_prompts_that_leave_no_room_are_refused() -> None:
    lm = tiny_lm()
    with pytest.raises(TokenizationError, match="no token to go on from"):
        complete(lm, ["Rome", ""], new_tokens=3)
    full = "I" + " I" * 63
    assert len(encode(lm, [full])[0]) == 64 == lm.max_length
    with pytest.raises(TokenizationError, match="leaves no room"):
        complete(lm, [full], new_tokens=3)
    assert complete(lm, [], new_tokens=3) == []
    near = "I" + " I" * 60
    assert complete(lm, [near], new_tokens=50) == complete(lm, [near], new_tokens=3)


def test_nan_is_told() -> None:
    lm = tiny_lm()
    with torch.no_grad():
        weight_out_in(lm.mlp_out(2))[0, 0] = float("nan")
    for top_k in (0, 5):
        with pytest.raises(NotFiniteError, match="tiny-gpt2"):
            complete(lm, ["Rome"], new_tokens=2, top_k=top_k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_writes(dtype: torch.dtype) -> None:
    lm = tiny_lm("llama", dtype=dtype)
    assert complete(lm, ["Rome"], new_tokens=4, top_k=5, seed=1) == complete(
        lm, ["Rome"], new_tokens=4, top_k=5, seed=1
    )


@pytest.mark.parametrize("kind", ["bytes", "bytes-bos", "metaspace", "wordpiece"])
def test_random_prefixes_follow_memits_rule(kind: str) -> None:
    lm = tiny_lm(kind=kind)
    prefixes = random_prefixes(lm, count=12, length=15, seed=0)
    assert len(prefixes) == 12
    words = ("The", "Therefore", "Because", "I", "You")
    for index, prefix in enumerate(prefixes):
        assert prefix.startswith(words[index % 5])
        assert prefix.endswith(". ") and not prefix.endswith((" . ", ".. "))
        assert "{" not in prefix and "\n" not in prefix and "  " not in prefix
    assert prefixes == random_prefixes(lm, count=12, length=15, seed=0)
    assert prefixes != random_prefixes(lm, count=12, length=15, seed=1)
    assert len(set(prefixes)) > 5  # the same first word goes on differently
    assert random_prefixes(lm, count=0, length=15, seed=0) == []


def test_starts_that_fill_the_length_stay_as_they_are() -> None:
    assert random_prefixes(tiny_lm(), count=5, length=1, seed=0) == [
        "The. ",
        "Therefore. ",
        "Because. ",
        "I. ",
        "You. ",
    ]


def test_braces_and_nothing_in_what_the_model_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" {} {x", "", " ...\n\n", "\t }", " end. "]
    monkeypatch.setattr("errata.lm.generate.complete", lambda *_, **__: texts)
    lm = tiny_lm()
    prefixes = random_prefixes(lm, count=5, length=10, seed=0)
    assert prefixes == ["The x. ", "Therefore. ", "Because. ", "I. ", "You end. "]
    request = Request("The capital of {} is", "France", "Rome")
    for prefix in prefixes:
        (row,) = encode_requests(lm, [request], prefix=prefix)
        subject = decode(lm, row.ids[row.subject_first : row.subject_last + 1])
        assert subject.strip() == "France"
        Request(prefix + request.prompt, request.subject, request.target)
