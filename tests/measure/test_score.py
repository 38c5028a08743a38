from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import pytest
import torch

from errata.errors import (
    ConfigError,
    DatasetError,
    NotFiniteError,
    RequestError,
    RequestFileError,
    StorageError,
    TokenizationError,
)
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.measure import metrics
from errata.measure.datasets import zsre
from errata.measure.likelihood import _batches, _shared_rows, judge
from errata.measure.score import Scores, score
from errata.requests import Case, Probe, Request
from tests.measure.plain import judge_plainly, pairs_of

WORDS = (
    "Rome",
    "Paris",
    "Nile",
    "sea",
    "the",
    "river",
    "of",
    "Hamlet",
    "Schönbrunn",
    "東京",
    "🙂",
    "{x}",
)


def some_cases(count: int = 6) -> list[Case]:
    """Cases with prompts and targets of all lengths, some of them shared."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    cases = []
    for number in range(count):
        new, true = text(1, 3), text(1, 3) + " now"
        shared = Probe("The capital of Italy is", true)
        cases.append(
            Case(
                request=Request("The {} of", text(1, 4), new, true),
                case_id=str(number),
                paraphrases=(text(2, 9), text(2, 9)),
                neighbours=(shared, *(Probe(text(2, 9), true) for _ in range(3))),
                attributes=(Probe(text(2, 9), new),),
                same_subject=(Probe(text(2, 9), "Vienna"),),
                generation=("The Nile", "Paris"),
                references=("The Nile flows to the sea.",),
            )
        )
    return cases


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_every_probability_equals_the_plain_computation(
    tiny_lm: LanguageModel, batch_tokens: int
) -> None:
    pairs = [pair for case in some_cases() for pair in pairs_of(case)]
    judged = judge(tiny_lm, pairs, batch_tokens=batch_tokens)
    for pair in pairs:
        (plain,) = judge_plainly(tiny_lm, [pair])
        assert judged[pair].logprobs == pytest.approx(plain.logprobs, abs=1e-5)
        assert judged[pair].hits == plain.hits


def test_paddings_side_does_not_matter(tiny_lm: LanguageModel) -> None:
    pairs = pairs_of(some_cases(1)[0])
    tiny_lm.tokenizer.padding_side = "left"
    left = judge(tiny_lm, pairs)
    tiny_lm.tokenizer.padding_side = "right"
    assert left == judge(tiny_lm, pairs)


def test_one_row_answers_for_all_pairs_that_it_covers() -> None:
    sequences = [(1, 2), (1, 2, 3), (4,), (1, 2), (1,), (1, 2, 5)]
    rows, row_of = _shared_rows(sequences, [()] * len(sequences))
    assert sorted(rows) == [(1, 2, 3), (1, 2, 5), (4,)]
    for sequence, row in zip(sequences, row_of, strict=True):
        assert rows[row][: len(sequence)] == sequence


def test_batches_hold_every_row_once_with_little_padding() -> None:
    lengths = [random.randint(1, 60) for _ in range(300)] + [700]
    groups = _batches(lengths, 512)
    assert sorted(index for group in groups for index in group) == list(range(301))
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        assert padded <= 512 or len(group) == 1
        assert padded - sum(lengths[index] for index in group) <= 32


def test_metrics_are_those_of_the_raw_numbers(tiny_lm: LanguageModel) -> None:
    case = some_cases(1)[0]
    (row,) = score(tiny_lm, [case]).rows
    new, true = case.request.target, case.request.true
    assert true is not None
    plain = {pair: judge_plainly(tiny_lm, [pair])[0] for pair in pairs_of(case)}
    nll = {pair: answer.nll for pair, answer in plain.items()}
    assert row["metrics"]["ES"] == float(nll[case.request.text, true] > nll[case.request.text, new])
    gain = [math.exp(-nll[p, new]) - math.exp(-nll[p, true]) for p in case.paraphrases]
    assert row["metrics"]["PM"] == pytest.approx(sum(gain) / 2, abs=1e-5)
    kept = [nll[n.prompt, true] < nll[n.prompt, new] for n in case.neighbours]
    assert row["metrics"]["NS"] == sum(kept) / 4
    hits = [hit for p in case.paraphrases for hit in plain[p, new].hits]
    assert row["metrics"]["paraphrases.token"] == sum(hits) / len(hits)
    whole = [all(plain[n.prompt, true].hits) for n in case.neighbours]
    assert row["metrics"]["neighbours.answer"] == sum(whole) / 4
    assert row["same_subject"][0]["rival"] == new
    assert row["attributes"][0]["rival"] == true


def test_free_generation_is_what_the_model_writes(tiny_lm: LanguageModel) -> None:
    """An answer taken from the model's own continuation is read; another is not."""
    prompt = "The Nile is"
    (says,) = complete(tiny_lm, [prompt], new_tokens=8)
    words = says.split()
    own = next(w for w in (" ".join(words[:k]) for k in range(1, 4)) if metrics.reads(says, w))
    for target, expected in ((own, 1.0), ("nothing of the kind", 0.0)):
        case = Case(Request("The {} is", "Nile", target))
        (row,) = score(tiny_lm, [case], protocols=["free"]).rows
        assert row["rewrite"][0]["says"].startswith(says)
        assert row["metrics"] == {"rewrite.free": expected}


def test_protocols_stay_apart(tiny_gpt2: LanguageModel) -> None:
    cases = some_cases(2)
    kinds = {
        "probability": {"ES", "EM", "PS", "PM", "NS", "NM", "success", "magnitude", "S"},
        "teacher-forced": {"token", "answer"},
        "free": {"free"},
    }
    everything: dict[str, Any] = {}
    for protocol, names in kinds.items():
        summary = score(tiny_gpt2, cases, protocols=[protocol]).summary()  # type: ignore[list-item]
        assert {name.rsplit(".")[-1] for name in summary} == names
        everything |= summary
    together = score(tiny_gpt2, cases).summary()
    assert set(together) == set(everything)
    for name, estimate in together.items():
        assert estimate == pytest.approx(everything[name], abs=1e-5)
    with pytest.raises(ConfigError, match="unknown protocols"):
        score(tiny_gpt2, cases, protocols=["guess"])  # type: ignore[list-item]


def test_what_cannot_be_measured_is_absent(tiny_gpt2: LanguageModel) -> None:
    """No true target: no comparison. No neighbours: no NS and no S. Other cases still count."""
    bare = Case(Request("The {} is", "Nile", "Rome"))
    (row,) = score(tiny_gpt2, [bare], protocols=["probability"]).rows
    assert row["metrics"] == {}
    known = Case(Request("The {} is", "Nile", "Rome", "Paris"))
    summary = score(tiny_gpt2, [bare, known, *some_cases(2)]).summary()
    assert (summary["ES"].n, summary["NS"].n, summary["rewrite.token"].n) == (3, 2, 4)
    assert "S" not in score(tiny_gpt2, [known]).summary()


def test_an_answer_is_not_its_own_rival(tiny_gpt2: LanguageModel) -> None:
    case = Case(Request("The {} is", "Nile", "Rome", "Paris"), neighbours=(Probe("It is", "Rome"),))
    (row,) = score(tiny_gpt2, [case]).rows
    assert "NS" not in row["metrics"] and "neighbours.token" in row["metrics"]


def test_columns_come_in_the_papers_order(tiny_gpt2: LanguageModel) -> None:
    scores = score(tiny_gpt2, some_cases(3), generation=True)
    columns = list(scores.summary())
    assert columns[:9] == ["S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS"]
    assert [row[0] for row in scores.table()] == columns
    summary = scores.summary()
    means = [summary[name].mean for name in ("ES", "PS", "NS")]
    assert summary["S"].mean == pytest.approx(harmonic_mean(means))


def test_generation_is_seeded_and_includes_the_prompt(tiny_lm: LanguageModel) -> None:
    cases = some_cases(2)
    first, again, other = (
        score(tiny_lm, cases, protocols=[], generation=True, seed=seed) for seed in (5, 5, 6)
    )
    assert first.rows == again.rows
    assert first.rows[0]["texts"] != other.rows[0]["texts"]
    assert first.rows[0]["texts"][0].startswith("The Nile")
    assert first.rows[0]["texts"] != first.rows[1]["texts"]  # one prompt, two samples
    assert set(first.rows[0]["metrics"]) == {"GE", "RS"}


def test_zsre_is_scored_by_tokens(tiny_gpt2: LanguageModel) -> None:
    record = {"subject": "Nile", "src": "Where is the Nile?", "rephrase": "The Nile is where?",
              "alt": "Rome", "answers": ["the sea"], "loc": "who", "loc_ans": "Paris"}  # fmt: skip
    summary = score(tiny_gpt2, zsre.cases([record]), protocols=["teacher-forced"]).summary()
    assert {"rewrite.token", "paraphrases.token", "neighbours.token", "S.token"} <= set(summary)


def test_rows_go_to_a_file_and_back(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    scores = score(tiny_gpt2, some_cases(2), generation=True)
    path = tmp_path / "new" / "scores.jsonl"
    scores.to_jsonl(path)
    scores.to_jsonl(path)
    assert Scores.from_jsonl(path) == scores
    assert [p.name for p in path.parent.iterdir()] == ["scores.jsonl"]
    assert Request.from_dict(
        {k: scores.rows[0][k] for k in ("prompt", "subject", "target", "true")}
    )


def test_bad_score_files(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({"metrics": {}}) + '\n{"metrics": ', encoding="utf-8")
    with pytest.raises(RequestFileError, match="line 2"):
        Scores.from_jsonl(path)
    path.write_text('{"metrics": {}}\n{"prompt": 1}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match="line 2"):
        Scores.from_jsonl(path)
    with pytest.raises(StorageError, match="cannot write"):
        Scores(()).to_jsonl(path / "below a file")


def test_nan_weights_are_not_scored(tiny_gpt2: LanguageModel) -> None:
    with torch.no_grad():
        tiny_gpt2.mlp_out(1).weight[0, 0] = math.nan  # type: ignore[operator]
    with pytest.raises(NotFiniteError, match="NaN"):
        score(tiny_gpt2, some_cases(1))


def test_nothing_to_score(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(RequestError, match="no case"):
        score(tiny_gpt2, [])
    with pytest.raises(TokenizationError, match="no token"):
        judge(tiny_gpt2, [("", "Rome")])
    with pytest.raises(TokenizationError, match="longer than"):
        judge(tiny_gpt2, [("Nile " * 200, "Rome")])


def test_scoring_leaves_the_random_state_alone(tiny_gpt2: LanguageModel) -> None:
    state = torch.get_rng_state()
    score(tiny_gpt2, some_cases(1), generation=True)
    assert torch.equal(state, torch.get_rng_state())


def test_progress_ends_every_stage(tiny_gpt2: LanguageModel) -> None:
    told: dict[str, tuple[int, int]] = {}
    score(
        tiny_gpt2,
        some_cases(2),
        generation=True,
        progress=lambda stage, done, total: told.update({stage: (done, total)}),
    )
    assert set(told) == {"probabilities", "answers", "texts"}
    assert all(done == total for done, total in told.values())
