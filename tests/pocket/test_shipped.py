"""The readers that come with errata: small, loaded by name, and they know what their cards say."""

from __future__ import annotations

import random

import pytest

from errata.lm.load import LanguageModel, pocket_folder
from errata.lm.loss import predictions
from errata.pocket.claims import LABELS
from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.knowledge import Asked, all_claims, all_questions, answers, checks, load

READERS = ("pocket-bert", "pocket-t5")


@pytest.fixture(scope="module")
def encyclopedia() -> Encyclopedia:
    return Encyclopedia.load()


def some(asked: list[Asked], setting: str) -> list[Asked]:
    """A sample of what is asked in a setting."""
    return random.Random(0).sample([one for one in asked if one.setting == setting], 150)


def test_they_are_small() -> None:
    files = [file for name in READERS for file in pocket_folder(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 15_000_000


def test_pocket_bert_tells_true_from_false(encyclopedia: Encyclopedia) -> None:
    network, tokenizer = load(pocket_folder("pocket-bert"))
    claims = all_claims(encyclopedia, seed=1)
    for setting in ("seen, true", "seen, false", "held out, true", "held out, false"):
        right = checks(network, tokenizer, some(claims, setting))
        assert sum(right) > 0.94 * len(right)


def test_pocket_t5_answers(encyclopedia: Encyclopedia) -> None:
    network, tokenizer = load(pocket_folder("pocket-t5"))
    questions = all_questions(encyclopedia)
    for setting, share in (("seen", 0.93), ("held out", 0.8)):
        right = answers(network, tokenizer, some(questions, setting))
        assert sum(right) > share * len(right)


def test_what_is_measured_is_what_the_models_say(encyclopedia: Encyclopedia) -> None:
    claims = some(all_claims(encyclopedia, seed=2), "held out, false")[:40]
    lm = LanguageModel.load("pocket-bert")
    assert (lm.task, lm.labels) == ("classify", LABELS)
    said = predictions(lm, [claim.prompt for claim in claims])
    found = [label == claim.answer for label, claim in zip(said, claims, strict=True)]
    assert found == checks(*load(pocket_folder("pocket-bert")), claims)

    questions = some(all_questions(encyclopedia), "held out")[:40]
    lm = LanguageModel.load("pocket-t5")
    assert (lm.kind, lm.layers) == ("encoder-decoder", 8)
    said = predictions(lm, [question.prompt for question in questions])
    found = [text == question.answer for text, question in zip(said, questions, strict=True)]
    assert found == answers(*load(pocket_folder("pocket-t5")), questions)
