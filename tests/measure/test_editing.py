"""Edit accuracy and drawdown against what their definitions say, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from errata.errors import ConfigError, NotFiniteError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses, predictions
from errata.lm.weights import weight_out_in
from errata.measure import editing
from errata.measure.editing import (
    COMPARISONS,
    Answered,
    answered,
    asked,
    compared,
    drawdown,
    edit_accuracy,
    perplexity_drawdown,
    unedited,
)
from errata.measure.score import COLUMNS, Scores
from errata.measure.shares import Question, probabilities, recovered
from errata.requests import Case, Probe, Request
from tests.lm.families import tiny_lm


def said(*right: bool, nll: float = 1.0, tokens: int = 2) -> Answered:
    return Answered(right, (nll,) * len(right), (tokens,) * len(right))


NOTHING = Answered((), (), ())


def test_accuracy_is_averaged_within_a_case_first() -> None:
    found = edit_accuracy([said(True, True, False, False), said(True), NOTHING])
    assert found is not None and found.mean == 0.75 and found.n == 2
    assert 0 <= found.low < 0.75 < found.high <= 1
    assert edit_accuracy([NOTHING]) is None


def test_drawdown_is_the_accuracy_lost() -> None:
    before = [said(True, True), said(True, False), NOTHING]
    after = [said(True, False), said(False, True), NOTHING]
    found = drawdown(before, after)
    assert found is not None and found.mean == 0.25 and found.n == 2
    gained = drawdown(after, before)
    assert gained is not None and gained.mean == -0.25
    assert drawdown([NOTHING], [NOTHING]) is None


def test_perplexity_is_that_of_all_tokens() -> None:
    before = [said(True, nll=1.0, tokens=1), said(True, nll=2.0, tokens=3), NOTHING]
    after = [said(True, nll=1.5, tokens=1), said(True, nll=2.5, tokens=3), NOTHING]
    found = perplexity_drawdown(before, after)
    wanted = math.exp((1.5 + 3 * 2.5) / 4) - math.exp((1 + 3 * 2) / 4)
    assert found is not None and found.mean == pytest.approx(wanted) and found.n == 2
    assert found.low < found.mean < found.high
    assert perplexity_drawdown(before, after) == found  # the bootstrap is seeded
    alone = perplexity_drawdown(before[:1], after[:1])
    assert alone is not None and math.isnan(alone.low)
    assert perplexity_drawdown([NOTHING], [NOTHING]) is None


@pytest.mark.parametrize("batch_tokens", [4096, 15])
def test_it_asks_each_question_by_itself(tiny_gpt2: LanguageModel, batch_tokens: int) -> None:
    prompts = ["The capital of France is", "Rivers flow to", "Vienna"]
    texts = [text.split()[0] if text else "" for text in predictions(tiny_gpt2, prompts)]
    examples = [
        Example(p, a) for p, a in zip(prompts, ["Paris", "the North Sea", "Rome"], strict=True)
    ]
    examples.append(Example(prompts[0], predictions(tiny_gpt2, prompts[:1], new_tokens=1)[0]))
    assert texts
    found = answered(tiny_gpt2, examples, batch_tokens=batch_tokens)
    with torch.no_grad():
        nll = [float(losses(tiny_gpt2, [example])) for example in examples]
    assert found.nll == pytest.approx(nll, rel=1e-4)
    tokens = [len(tiny_gpt2.tokenizer(" " + e.answer)["input_ids"]) for e in examples]
    assert list(found.tokens) == tokens
    assert found.right[0] is False
    if tokens[3] == 1:  # its own top token
        assert found.right[3] is True


def test_a_classifier_is_right_where_its_label_is() -> None:
    lm = tiny_lm("bert-labels")
    prompts = ["The capital of France is Paris", "Rivers flow to the sea", "Vienna"]
    labels = predictions(lm, prompts)
    others = [next(name for name in lm.labels if name != label) for label in labels]
    examples = [Example(p, a) for p, a in zip(prompts * 2, labels + others, strict=True)]
    found = answered(lm, examples)
    assert found.right == (True,) * 3 + (False,) * 3
    assert found.tokens == (1,) * 6 and found.accuracy == 0.5


def test_a_model_without_finite_numbers_is_refused(tiny_gpt2: LanguageModel) -> None:
    with torch.no_grad():
        weight_out_in(tiny_gpt2.mlp_in(0))[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="not finite"):
        answered(tiny_gpt2, [Example("Vienna", "Rome")])


def test_nothing_asked_is_nothing_answered(tiny_gpt2: LanguageModel) -> None:
    assert answered(tiny_gpt2, []) == NOTHING


def cases_of(lm: LanguageModel) -> list[Case]:
    """Some that the model answers rightly and some that it does not; one asks nothing else."""
    prompts = ["The capital of France is", "Rivers flow to", "Vienna lies on", "Goethe wrote"]
    own = predictions(lm, prompts, new_tokens=8)
    kept = tuple(Probe(p, a or "Paris") for p, a in zip(prompts, own, strict=True))
    wrong = tuple(Probe(p, lm.labels[0] if lm.labels else "Lima") for p in prompts)
    first = Request("{} is in", "Cairo", kept[0].answer)
    second = Request("{} is in", "Lima", "supports" if lm.labels else "Rome")
    return [
        Case(first, "a", paraphrases=("Where is Cairo? In", "Cairo lies in"), neighbours=kept),
        Case(second, "b", paraphrases=("Lima lies in",), neighbours=wrong + kept[:2]),
        Case(second, "c"),
    ]


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert", "bert-labels"])
def test_cases_are_compared_with_the_unedited_model(kind: str) -> None:
    """By hand, each case and each question by itself; for every kind of model."""
    lm = tiny_lm(kind)
    cases = cases_of(lm)
    comparisons = [c for c in COMPARISONS if lm.task == "generate" or c != "perplexity"]
    before = unedited(lm, cases, comparisons)
    paths = [lm.mlp_out_path(layer) for layer in range(lm.layers)]
    for path in paths:
        with torch.no_grad():
            weight_out_in(lm.module(path)).mul_(-1.5)
    found = compared(lm, cases, before, comparisons)
    for case, old, told in zip(cases, before, found, strict=True):
        groups = {name: answered(lm, examples) for name, examples in asked(case).items()}
        right = groups["rewrite"].right + groups["paraphrases"].right
        assert told["EA"] == sum(right) / len(right)
        (now,) = probabilities(lm, [Question(case.request.text, case.request.target)])
        wanted = recovered(old.target["rewrite"], now)
        assert told["rewrite.share"] == pytest.approx(wanted, abs=1e-4)
        assert ("S.share" in told) == bool(case.neighbours)
        assert told["EA.rewrite"] == told["Reliability.forced"] == groups["rewrite"].accuracy
        for name, those in groups.items():
            measured = bool(those.right) and lm.task == "generate"
            assert (f"{name}.perplexity" in told) == measured
            if measured:
                assert told[f"{name}.perplexity"] == pytest.approx(those.perplexity, rel=1e-4)
        if not case.neighbours:
            assert not {"DD", "DD.perplexity", "Locality", "Average"} & told.keys()
            continue
        kept = groups["neighbours"]
        assert told["DD"] == old.forced.accuracy - kept.accuracy
        assert ("DD.perplexity" in told) == (lm.task == "generate")
        held = [now for now, was in zip(kept.right, old.forced.right, strict=True) if was]
        assert told.get("Locality.forced") == (sum(held) / len(held) if held else None)
        if "Locality" in told:
            three = told["Reliability"], told["Generality"], told["Locality"]
            assert told["Average"] == pytest.approx(sum(three) / 3)
    summary = Scores(tuple({"metrics": one} for one in found)).summary()
    assert [name for name in COLUMNS if name in summary] == list(summary) and summary["EA"].n == 3


@pytest.mark.parametrize("kind", ["bert", "bert-labels"])
def test_what_writes_nothing_has_no_perplexity(kind: str) -> None:
    lm = tiny_lm(kind)
    with pytest.raises(ConfigError, match="writes nothing"):
        unedited(lm, cases_of(lm), ["perplexity"])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_what_need_not_be_written_out_is_what_would_be_written(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm(kind)
    cases = cases_of(lm)
    told = [old.said for old in unedited(lm, cases, COMPARISONS)]
    monkeypatch.setattr(editing, "reads_already", lambda *_, **__: None)
    assert [old.said for old in unedited(lm, cases, COMPARISONS)] == told
    monkeypatch.setattr(editing, "predictions", lambda _, prompts, **__: [""] * len(prompts))
    assert not any(any(old.said) for old in unedited(lm, cases, COMPARISONS))


def test_what_it_says_by_itself_counts_for_the_answers(tiny_gpt2: LanguageModel) -> None:
    cases = cases_of(tiny_gpt2)
    editing, answers = COMPARISONS[:1], COMPARISONS[1:]
    before = unedited(tiny_gpt2, cases, answers)
    # Its own words, some of them cut off within a word; and what it does not say.
    assert any(before[0].said) and not any(before[1].said[:4])
    (told, *_) = compared(tiny_gpt2, cases, before, answers)
    assert told["Locality"] == 1.0 and "EA" not in told
    assert unedited(tiny_gpt2, cases, editing)[0].said == ()
    (plain, *_) = compared(tiny_gpt2, cases, unedited(tiny_gpt2, cases, editing), editing)
    assert plain["DD"] == 0.0 and plain["DD.perplexity"] == pytest.approx(0.0, abs=1e-3)
    assert "Reliability" not in plain
