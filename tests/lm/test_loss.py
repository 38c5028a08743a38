from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from errata.errors import ConfigError, NotFiniteError, RequestError, TokenizationError
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, answer_logits, beginnings, losses, predictions
from errata.lm.tokens import encode, encode_answers, encode_masked, encode_requests
from errata.lm.weights import weight_out_in
from errata.requests import Request
from tests.lm.families import OTHERS, VARIANTS, VOCABULARY, decode, tiny_lm

MASKED = ("bert", "roberta", "distilbert")
LABELLED = ("bert-labels", "roberta-labels", "distilbert-labels")
ANSWERING = ("t5", "t5-gated", "bart")

TEXTS = [
    Example("The capital of France is", "Paris"),
    Example("Rivers flow", "to the North Sea, and the children walk"),
    Example("Goethe", "wrote."),
]


@cache
def model(variant: str) -> LanguageModel:
    """Shared, since these tests change no weight."""
    return tiny_lm(variant)


def own_loss(lm: LanguageModel, labels: list[Any], **inputs: Tensor) -> Tensor:
    """What transformers itself says of one example."""
    network: Any = lm.network
    loss = network(**inputs, labels=torch.tensor(labels)).loss
    assert isinstance(loss, Tensor)
    return loss


def tokens(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def check(lm: LanguageModel, examples: list[Example], wanted: list[Tensor]) -> None:
    """Losses and their gradient are the wanted ones, in a batch and one by one."""
    found = losses(lm, examples)
    assert found.shape == (len(examples),)
    assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    alone = torch.cat([losses(lm, [example]) for example in examples])
    assert_close(found, alone, atol=1e-5, rtol=1e-5)
    weights = [lm.mlp_out(layer).weight for layer in range(lm.layers)]
    factors = torch.arange(1.0, len(examples) + 1)
    gradients = torch.autograd.grad((found * factors).sum(), weights)  # type: ignore[arg-type]
    wanted_sum = (torch.stack(wanted) * factors).sum()
    for got, want in zip(gradients, torch.autograd.grad(wanted_sum, weights), strict=True):  # type: ignore[arg-type]
        assert want.any()
        assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["gpt2", "llama", "opt", "gemma2-sliding"])
def test_losses_of_decoders(variant: str) -> None:
    lm = model(variant)
    wanted = []
    for example in TEXTS:
        ids = tokens(lm, f"{example.prompt} {example.answer}")
        prompt = len(tokens(lm, example.prompt))
        labels = [-100] * prompt + ids[prompt:]
        wanted.append(own_loss(lm, [labels], input_ids=torch.tensor([ids])))
    check(lm, TEXTS, wanted)


@pytest.mark.parametrize("variant", MASKED)
def test_losses_of_masks_at_the_end(variant: str) -> None:
    lm = model(variant)
    first, last = tokens_around(lm)
    mask = lm.tokenizer.mask_token_id
    wanted = []
    for example in TEXTS:
        prompt, answer = tokens(lm, example.prompt), tokens(lm, " " + example.answer)
        ids = [first, *prompt, *[mask] * len(answer), last]
        labels = [-100] * (1 + len(prompt)) + answer + [-100]
        wanted.append(own_loss(lm, [labels], input_ids=torch.tensor([ids])))
    check(lm, TEXTS, wanted)
    trailing = [Example(e.prompt + "  ", f" {e.answer} ") for e in TEXTS]
    assert_close(losses(lm, trailing), losses(lm, TEXTS))


@pytest.mark.parametrize("variant", MASKED)
def test_losses_of_a_mask_inside(variant: str) -> None:
    lm = model(variant)
    mask = lm.tokenizer.mask_token
    first, last = tokens_around(lm)
    examples, wanted = [], []
    for before, answer, after in (
        ("The capital of France is", " Paris", "."),
        ("The Nile flows to the", " Mediterranean Sea", ", the Rhine to the North Sea."),
        ("", "Goethe", " wrote poems"),
        ("Goethe (", "Beethoven", ") wrote poems"),
    ):
        blank = " " if answer.startswith(" ") else ""
        examples.append(Example(f"{before}{blank}{mask}{after}", answer.strip()))
        head, middle, tail = (tokens(lm, part) for part in (before, answer, after))
        ids = [first, *head, *[lm.tokenizer.mask_token_id] * len(middle), *tail, last]
        labels = [-100] * (1 + len(head)) + middle + [-100] * (1 + len(tail))
        if len(middle) == 1:  # the tokenizer reads the very same text
            assert ids == lm.tokenizer(examples[-1].prompt)["input_ids"]
        wanted.append(own_loss(lm, [labels], input_ids=torch.tensor([ids])))
    check(lm, examples, wanted)


def tokens_around(lm: LanguageModel) -> tuple[int, int]:
    """The special tokens before and after each text."""
    first, *_, last = lm.tokenizer("Paris")["input_ids"]
    return first, last


@pytest.mark.parametrize("variant", LABELLED)
def test_losses_of_labels(variant: str) -> None:
    lm = model(variant)
    prompts = ["Paris is in France.", "Rivers flow to the sea, the Rhine to the North Sea.", "No"]
    wanted = [
        own_loss(lm, [label], input_ids=torch.tensor([lm.tokenizer(prompt)["input_ids"]]))
        for prompt, label in zip(prompts, (1, 0, 2), strict=True)
    ]
    named = zip(prompts, ("supports", " refutes", "0"), strict=True)
    check(lm, [Example(*pair) for pair in named], wanted)
    numbered = losses(lm, [Example(prompts[0], "1"), Example(prompts[2], "2")])
    assert_close(numbered, torch.stack([wanted[0], wanted[2]]))


@pytest.mark.parametrize("variant", ANSWERING)
def test_losses_of_encoder_decoders(variant: str) -> None:
    lm = model(variant)
    wanted = []
    for example in TEXTS:
        ids = torch.tensor([lm.tokenizer(example.prompt)["input_ids"]])
        labels = lm.tokenizer(text_target=example.answer)["input_ids"]
        assert labels[-1] == lm.tokenizer.eos_token_id
        wanted.append(own_loss(lm, [labels], input_ids=ids, attention_mask=torch.ones_like(ids)))
    check(lm, TEXTS, wanted)


@pytest.mark.parametrize("variant", ["gpt2", "bert", "bert-labels", "t5"])
def test_losses_keep_the_weights_precision_where_it_is_more(variant: str) -> None:
    examples = [Example("The capital of France is", "1" if "labels" in variant else "Paris")]
    assert losses(tiny_lm(variant, dtype=torch.float64), examples).dtype == torch.float64
    half = losses(tiny_lm(variant, dtype=torch.bfloat16), examples)
    assert half.dtype == torch.float32
    assert_close(half, losses(tiny_lm(variant), examples), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("variant", ["gpt2", *OTHERS])
def test_no_example_gives_no_loss(variant: str) -> None:
    assert losses(model(variant), []).shape == (0,)
    assert predictions(model(variant), []) == []


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_empty_answers_are_refused(answer: str) -> None:
    with pytest.raises(RequestError, match="the answer to 'Who' is empty"):
        Example("Who", answer)


@pytest.mark.parametrize("answer", ["maybe", "3", "-1", "Supports"])
def test_unknown_labels_are_refused(answer: str) -> None:
    with pytest.raises(RequestError, match=r"no label .*it has refutes, supports, 0\."):
        losses(model("bert-labels"), [Example("Paris is in France.", answer)])


@pytest.mark.parametrize("variant", ["gpt2", "llama", *OTHERS])
def test_what_is_too_long_is_refused(variant: str) -> None:
    lm = tiny_lm(variant, model_max_length=64) if "t5" in variant else model(variant)
    answer = "supports" if "labels" in variant else "Paris"
    with pytest.raises(TokenizationError, match=r"longer than .* can read"):
        losses(lm, [Example("sea " * 80, answer)])
    with pytest.raises(TokenizationError):
        predictions(lm, ["sea " * 80])
    if lm.kind == "encoder-decoder":
        with pytest.raises(TokenizationError, match=r"longer than .* can read"):
            losses(lm, [Example("Rivers", "sea " * 80)])


def test_masks_must_be_one_and_between_words() -> None:
    lm = model("bert")
    with pytest.raises(TokenizationError, match=r"has 2 masks \[MASK\]; it may have one"):
        losses(lm, [Example("[MASK] is the capital of [MASK].", "Paris")])
    for prompt, answer in (("Pa[MASK]", "ris"), ("[MASK]ce", "Fran"), ("Fr[MASK]ce", "an")):
        with pytest.raises(TokenizationError, match="put the mask between whole words"):
            losses(lm, [Example(prompt, answer)])


@pytest.mark.parametrize("late", [False, True])
def test_a_mask_that_the_model_knows_is_needed(late: bool) -> None:
    lm = tiny_lm("bert", mask_token=None)
    if late:
        lm.tokenizer.add_tokens([f"word{i}" for i in range(VOCABULARY)])
        lm.tokenizer.add_special_tokens({"mask_token": "[LATE]"})
    with pytest.raises(TokenizationError, match="has no mask token"):
        losses(lm, [Example("Paris is in", "France")])
    with pytest.raises(TokenizationError, match="has no mask token"):
        predictions(lm, ["Paris is in"])


@pytest.mark.parametrize("variant", ["bert", "bart"])
def test_answers_without_a_token_are_refused(variant: str) -> None:
    with pytest.raises(TokenizationError, match="no token of its own"):
        losses(tiny_lm(variant, kind="masked"), [Example("Paris is in", "\u200b")])


@pytest.mark.parametrize("variant", ["bert", "roberta", "t5", "bart"])
def test_texts_keep_the_end_that_the_tokenizer_adds(variant: str) -> None:
    lm = model(variant)
    texts = ["The capital of France", "Paris"]
    assert encode(lm, texts) == [lm.tokenizer(text)["input_ids"] for text in texts]


def test_masks_hide_nothing_but_the_answer() -> None:
    lm = model("bert")
    (masked,) = encode_masked(lm, ["The capital of [MASK] is Paris."], ["North France"])
    assert masked.answer == tokens(lm, "north france")
    whole = list(masked.ids)
    whole[masked.first : masked.first + len(masked.answer)] = masked.answer
    assert whole == lm.tokenizer("The capital of North France is Paris.")["input_ids"]


@pytest.mark.parametrize("variant", ["bert", "bert-labels", "t5"])
def test_what_only_decoders_do(variant: str) -> None:
    lm = model(variant)
    request = Request("The capital of {} is", "France", "Rome")
    for refused in (
        lambda: encode_answers(lm, ["Paris is in"], ["France"]),
        lambda: encode_requests(lm, [request]),
        lambda: complete(lm, ["Paris is in"], new_tokens=3),
    ):
        with pytest.raises(ConfigError, match=f"needs a decoder; tiny-{variant} is an encoder"):
            refused()
    (found,) = encode_requests(lm, [request], target=False)
    subject = found.ids[found.subject_first : found.subject_last + 1]
    assert "".join(decode(lm, subject).split()).lower() == "france"


def test_predictions_of_a_decoder_are_its_continuations() -> None:
    lm, prompts = model("gpt2"), ["The capital of France is", "Rivers"]
    written = complete(lm, prompts, new_tokens=5)
    assert predictions(lm, prompts, new_tokens=5) == [text.strip() for text in written]


@pytest.mark.parametrize("variant", [*VARIANTS, *ANSWERING])
def test_one_pass_tells_how_what_is_written_begins(variant: str) -> None:
    lm = model(variant)
    prompts = ["The capital of France is", "Rivers flow to", "Vienna", "Goethe wrote the"]
    written = predictions(lm, prompts, new_tokens=8)
    examples, whole = [], []
    for prompt, text in zip(prompts, written, strict=True):
        words = text.split()
        for answer in (" ".join(words[:2]), " ".join([*words[:1], "Lima"]), "Lima", text, text[:3]):
            if answer.strip():
                examples.append(Example(prompt, answer))
                whole.append(text)
    answers = answer_logits(lm, examples, following=True)
    begun = beginnings(lm, examples, answers)
    for one, text in zip(begun, whole, strict=True):
        # Eight tokens may end before what follows an answer of eight.
        shorter = min(len(one.text.strip()), len(text))
        assert text[:shorter] == one.text.strip()[:shorter]
        assert not one.ended or one.text.strip() == text
    assert any(one.text.strip() for one in begun)
    assert_close(answers.losses(), losses(lm, examples))


@pytest.mark.parametrize("variant", LABELLED)
def test_predictions_of_labels(variant: str) -> None:
    lm = tiny_lm(variant)
    prompts = ["Paris is in France.", "No", "Rivers flow to the sea and the sea."]
    for prompt, label in zip(prompts, predictions(lm, prompts), strict=True):
        each = [float(losses(lm, [Example(prompt, name)]).detach()) for name in lm.labels]
        assert label == lm.labels[each.index(min(each))]


@pytest.mark.parametrize("variant", MASKED)
def test_predictions_fill_each_mask(variant: str) -> None:
    lm = model(variant)
    mask = lm.tokenizer.mask_token
    prompts = ["The capital of France is", f"The {mask} of Italy", f"{mask} and {mask}"]
    with torch.no_grad():
        for prompt, filled in zip(prompts, predictions(lm, prompts), strict=True):
            text = prompt if mask in prompt else f"{prompt} {mask}"
            ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
            at = ids[0] == lm.tokenizer.mask_token_id
            assert at.sum() == max(1, prompt.count(mask))
            best = lm.network(input_ids=ids).logits[0, at].argmax(-1)
            assert filled == str(lm.tokenizer.decode(best)).strip()


@pytest.mark.parametrize("variant", ANSWERING)
def test_predictions_of_encoder_decoders(variant: str) -> None:
    lm = tiny_lm(variant)
    network: Any = lm.network
    network.generation_config.forced_eos_token_id = None  # BART's own idea of a last token
    prompts = ["The capital of France is", "Rivers flow to the North Sea.", "Goethe"]
    found = predictions(lm, prompts, new_tokens=6)
    assert len(set(found)) > 1
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
        wanted = network.generate(input_ids=ids, max_new_tokens=6, do_sample=False, num_beams=1)
        assert text == decode(lm, wanted[0].tolist()).strip()


@pytest.mark.parametrize("variant", ["gpt2", "bert", "bert-labels", "t5", "bart"])
def test_what_is_learnt_is_predicted_and_ends(variant: str) -> None:
    lm = tiny_lm(variant)
    answers = ["supports", "refutes"] if lm.task == "classify" else ["Rome", "sea"]
    prompts = ["The capital of France is", "Rivers flow to the North"]
    optimizer = torch.optim.Adam(lm.network.parameters(), lr=0.005)
    examples = [Example(*pair) for pair in zip(prompts, answers, strict=True)]
    for _ in range(60):
        optimizer.zero_grad()
        losses(lm, examples).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = [text.lower() for text in predictions(lm, prompts, new_tokens=12)]
    if variant == "gpt2":  # which was not taught to stop
        found = [text[: len(answer)] for text, answer in zip(found, answers, strict=True)]
    assert found == [answer.lower() for answer in answers]


def test_answers_of_a_broken_encoder_decoder() -> None:
    lm = tiny_lm("t5")
    with torch.no_grad():
        weight_out_in(lm.mlp_out(4))[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="tiny-t5 gives probabilities that are not finite"):
        predictions(lm, ["Paris"])
