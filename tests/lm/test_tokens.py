from __future__ import annotations

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import TokenizationError
from errata.lm.load import LanguageModel
from errata.lm.tokens import batches, encode, encode_answers, encode_requests, pad
from errata.requests import Request
from tests.lm.families import TOKENIZERS, decode, network, tiny_lm, tokenizer

NETWORK = network("gpt2")
NETWORK.config.n_positions = 256  # it is never run here
LMS = {kind: LanguageModel.of(NETWORK, tokenizer(kind), name=kind) for kind in TOKENIZERS}
BYTES = [kind for kind in TOKENIZERS if kind.startswith("bytes")]

REQUESTS = {
    "start": Request("{} lies on the river", "Vienna", "Danube"),
    "middle": Request("The capital of {} is", "France", "Rome"),
    "end": Request("Who wrote the letters of {}", "Marie Curie", "him"),
    "alone": Request("{}", "Paris", "London"),
    "possessive": Request("{}'s capital is", "Italy", "Rome"),
    "twice": Request("Paris, Paris; the other {} is", "Paris", "Rome"),
    "accents": Request("The river {} flows to", "Žižkův Dvůr é", "São"),
    "decomposed": Request("The cafe\u0301 of {} is", "Rene\u0301", "E\u0301"),
    "cjk": Request("The capital of {} is", "日本国", "東京"),
    "cjk-without-blanks": Request("首都{}是", "法国", "巴黎"),
    "emoji": Request("I see {} there:", "👩🏽‍🚀", "👨‍👩‍👧‍👦"),
    "braces": Request("In {{a}} the set {} has", "{x} {}", "{y}"),
    "blank-after-prompt": Request("The capital of {} is ", "France", "Rome"),
    "blanks-after-prompt": Request("The capital of {}   ", "France", "Rome"),
    "blank-before-target": Request("The capital of {} is", "France", " Rome"),
    "blanks-around-subject": Request("The capital of {} is", " France ", "Rome"),
    "newline": Request("Who?\nThe author of {} is:\n", "Hamlet", "him"),
    "long-target": Request("{} wrote", "Goethe", " ".join(["poems and"] * 5)),
    "one-character": Request("{} is", "I", "a"),
}


def visible(text: str) -> str:
    """Without blanks and loose accents, which some tokenizers pass over."""
    return "".join(c for c in text if not unicodedata.combining(c)).strip()


def prompt_of(request: Request) -> str:
    return request.text.rstrip(" ")


@pytest.mark.parametrize("prefix", ["", "Therefore it is. ", "👩🏽‍🚀 {} é. "])
@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_parts_cover_their_words(kind: str, case: str, prefix: str) -> None:
    """Subject, prompt and answer, decoded from their tokens, say what the request says."""
    lm, request = LMS[kind], REQUESTS[case]
    (row,) = encode_requests(lm, [request], prefix=prefix)
    text = prefix + prompt_of(request) + " " + request.target.strip()
    tokens = lm.tokenizer(text, return_offsets_mapping=True)
    assert row.ids == tokens["input_ids"][: len(row.ids)]
    offsets = tokens["offset_mapping"]
    start = len(prefix) + request.span[0]
    end = start + len(request.subject.rstrip())
    start += len(request.subject) - len(request.subject.lstrip())
    # The subject's first and last characters are in its first and last tokens, and no later token
    # has a character of it.
    first, last = offsets[row.subject_first], offsets[row.subject_last]
    assert first[0] <= start < first[1]
    assert last[0] < end and not visible(text[last[1] : end])
    assert all(begin >= end for begin, _ in offsets[row.subject_last + 1 : len(row.ids)])
    # The answer's tokens are the answer's characters, all of them and no other.
    edge = len(prefix + prompt_of(request))
    answer = offsets[row.prompt_length : len(row.ids)]
    assert visible(text[answer[0][0] : answer[-1][1]]) == visible(request.target)
    assert all(begin < edge or end <= edge for begin, end in offsets[: row.prompt_length])
    assert 0 <= row.subject_first <= row.subject_last < row.prompt_length < len(row.ids)


@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.parametrize("kind", BYTES)
def test_target_ids_are_those_of_the_spaced_target_alone(kind: str, case: str) -> None:
    lm, request = LMS[kind], REQUESTS[case]
    (row,) = encode_requests(lm, [request])
    alone = lm.tokenizer(" " + request.target.strip(), add_special_tokens=False)["input_ids"]
    assert row.answer == alone


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_subject_ends_alike_with_and_without_target(kind: str) -> None:
    lm = LMS[kind]
    for request in REQUESTS.values():
        (whole,) = encode_requests(lm, [request])
        (prompt,) = encode_requests(lm, [request], target=False)
        assert prompt.ids == whole.ids[: whole.prompt_length]
        assert prompt.answer == []
        assert (prompt.subject_first, prompt.subject_last) == (
            whole.subject_first,
            whole.subject_last,
        )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_padding_side_and_padding_settings_do_not_matter(kind: str) -> None:
    odd = tokenizer(kind, padding_side="left", truncation_side="left", pad_token="<s>")
    odd.backend_tokenizer.enable_padding(length=50, direction="left")
    odd.backend_tokenizer.enable_truncation(3)
    lm = LanguageModel.of(NETWORK, odd)
    requests = list(REQUESTS.values())
    assert encode_requests(lm, requests) == encode_requests(LMS[kind], requests)


def test_the_document_mark_stays_in_front_and_leaves_the_end() -> None:
    for kind, marked in (("bytes", False), ("bytes-bos", True), ("bytes-both", True)):
        (row,) = encode(LMS[kind], ["The sea"])
        assert (row[0] == 0, row[-1] == 0) == (marked, False)
    assert encode(LMS["bytes-eos"], ["The sea"]) == encode(LMS["bytes"], ["The sea"])
    assert encode(LMS["bytes"], ["The sea<s>"])[0][-1] == 0  # written by the user, so kept
    assert encode(LMS["bytes"], ["", "sea"])[0] == []
    assert encode(LMS["bytes"], []) == []


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_answers_without_a_token_are_refused(kind: str) -> None:
    with pytest.raises(TokenizationError, match="has no token of its own"):
        encode_answers(LMS[kind], ["The sea", "The sea is"], ["is", "  "])


def test_prompts_without_a_token_are_refused() -> None:
    with pytest.raises(TokenizationError, match="could be continued"):
        encode_answers(LMS["bytes"], [""], ["Rome"])
    (row,) = encode_answers(LMS["bytes-bos"], [""], ["Rome"])
    assert row.prompt_length == 1


def test_forty_tokens_of_target_and_one_too_many() -> None:
    lm = tiny_lm()
    target = " ".join("I" for _ in range(40))
    (row,) = encode_requests(lm, [Request("{} say", "You", target)])
    assert len(row.answer) == 40
    with pytest.raises(TokenizationError, match=r"longer than tiny-gpt2 can read \(64\)"):
        encode_requests(lm, [Request("{} say", "You", target + 30 * " I")])


def test_too_long_texts_print_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny_lm(model_max_length=8)
    assert len(encode(lm, ["The capital of France is Paris; the capital of Italy is Rome."])[0]) > 8
    assert not caplog.records


def test_a_token_across_the_border_is_refused() -> None:
    """As a tokenizer without any notion of words may merge them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate("ab ")}
    merges = [("a", " "), ("a ", "b")]
    words = Tokenizer(models.BPE({**vocabulary, "a ": 3, "a b": 4}, merges))
    lm = LanguageModel.of(NETWORK, PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(TokenizationError, match="both the prompt and what follows"):
        encode_answers(lm, ["bba"], ["bb"])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    large = tokenizer()
    large.add_tokens(["Paris"])
    with pytest.raises(TokenizationError, match="belongs to another model"):
        encode(LanguageModel.of(NETWORK, large), ["In Paris"])


def test_a_subject_that_vanishes_is_refused() -> None:
    from tokenizers import normalizers

    silent = tokenizer()
    silent.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(TokenizationError, match="belongs to the subject '~'"):
        encode_requests(LanguageModel.of(NETWORK, silent), [Request("The {} is", "~", "sea")])


def test_pad_fills_the_right() -> None:
    lm = tiny_lm(pad_token="<s>", padding_side="left")
    batch = pad(lm, [[5, 6, 7], [8]])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.ids.dtype == torch.long


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_batches_hold_everything_once_within_the_limit(lengths: list[int], limit: int) -> None:
    groups = batches(lengths, limit)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit


@given(
    before=st.text(max_size=6),
    subject=st.text(min_size=1, max_size=6).filter(str.strip),
    after=st.text(max_size=6),
    target=st.text(min_size=1, max_size=6).filter(str.strip),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", ["bytes", "bytes-trimmed-bos"])
def test_any_text_is_aligned(kind: str, before: str, subject: str, after: str, target: str) -> None:
    if "{}" in before + after or (before + "{}" + after).count("{}") != 1:
        return
    lm = LMS[kind]
    request = Request(f"{before}{{}}{after}", subject, target)
    (row,) = encode_requests(lm, [request])
    answer = decode(lm, row.answer)
    assert answer.strip() == target.strip() or "<s>" in request.text + target
    assert row.subject_last < row.prompt_length
