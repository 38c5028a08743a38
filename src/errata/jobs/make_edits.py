"""Edits of a classifier's own mistakes: appendix A of SaLEM's paper (Mishra et al. 2024).

::

    made = make_edits("paper_dev.jsonl", "bert-base-uncased", "fever")
    made.statistics()                 # the columns of the paper's Table 5
    # fever/fold-1 is a classifier; fever/fold-1/train.jsonl and validation.jsonl are Cases

The examples are divided into k folds. For each, a classifier learns from the others, and the fold
is divided by what it says: what it gets wrong is to be corrected (X_fail), what it gets right is
to stay (X_pass). Every text of X_fail is rephrased (X_adapt), and rephrasings that are not alike
enough are dropped. Of both sets nine in ten are for training, and one for validation: no neighbour
of a validation case is met in training. The paper's last step, manual filtration, is left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from errata.editors.config import Config
from errata.errors import ConfigError, DatasetError
from errata.jobs.classifier import ClassifierConfig, cut, tokenizer_of, train_classifier
from errata.jobs.files import check_writable, make_folder, write_text
from errata.jobs.methods import nested
from errata.jobs.rephrasing import RULES, Rephraser, rephraser
from errata.lm.load import LanguageModel
from errata.lm.loss import predictions
from errata.lm.sentences import SentenceEncoder
from errata.measure.datasets import read_labelled
from errata.measure.datasets.labelled import Labelled
from errata.measure.similarity import Measure, similarities
from errata.progress import Progress, silent
from errata.requests import Case, Probe

logger = logging.getLogger(__name__)

T = TypeVar("T")

COIN = ("FEVER",)
"""Data sets of which the papers draw the labels to edit by a fair coin."""

TRAIN, VALIDATION, TOLD, CHECKPOINTS = "train.jsonl", "validation.jsonl", "made.json", "checkpoint"


@dataclass(frozen=True)
class MakeEditsConfig(Config):
    """Numbers of `make_edits`."""

    folds: int = 3
    """k: each example is judged by a classifier that has not learnt from it."""
    coin: bool | None = None
    """Flip a classifier's answer where a fair coin says so, whether it is right or not, instead of
    correcting its mistakes; by default as the papers do with the data set."""
    rephrasings: int = 5
    """Kept of each text, at most; twice as many are asked for."""
    least: float = 0.4
    """How alike a rephrasing must be to its text."""
    similarity: Measure = "sentence"
    """Measured by the texts' cosine, or BERTScore's F1."""
    neighbours: int = 10
    """Answers that must stay with each case."""
    validation: float = 0.1
    """Share of the cases, and of the neighbours, for validation."""
    seed: int = 0
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        self._require(self.folds > 1, f"folds must be at least 2, got {self.folds}.")
        self._not_negative("rephrasings", "neighbours")
        self._require(
            0 < self.validation < 1, f"validation must be between 0 and 1, got {self.validation}."
        )


@dataclass(frozen=True)
class FoldStatistics:
    """What one fold gave: a row of the paper's Table 5."""

    instances: int
    accuracy: float
    """Of the fold's classifier on the fold."""
    edits: int
    """X_fail: cases."""
    adaptive: int
    """X_adapt: their rephrasings that were alike enough."""
    dropped: int
    """Rephrasings that were not."""
    kept: int
    """X_pass: texts whose answer must stay."""


@dataclass(frozen=True)
class Made:
    """What `make_edits` made."""

    data: str
    """The data set's name."""
    labels: tuple[str, ...]
    folder: Path
    folds: tuple[FoldStatistics, ...]
    shortened: int
    """Texts that were cut."""

    def statistics(self) -> FoldStatistics:
        """All folds together: the data set's row of Table 5."""
        total = sum(fold.instances for fold in self.folds)
        right = sum(fold.accuracy * fold.instances for fold in self.folds)
        counts = {
            name: sum(getattr(fold, name) for fold in self.folds)
            for name in ("edits", "adaptive", "dropped", "kept")
        }
        return FoldStatistics(total, right / total, **counts)


def make_edits(
    data: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    count: int | None = None,
    rephrase: str | Path = RULES,
    prefix: str = "",
    encoder: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Made:
    """Train classifiers, and make Cases of what they get wrong.

    Args:
        data: a file of texts with labels in a published format, or `hub:NAME`.
        base: any encoder, by folder or Hub name.
        out: a folder; in it one for each fold, a model with its cases.
        settings: fields of `MakeEditsConfig` that differ from its defaults.
        count: only so many examples, drawn by the seed.
        rephrase: as `rephraser` takes it.
        prefix: what a rephrasing model wants before each text.
        encoder: the sentence encoder that similarity is measured with; `base` by default.
        resume: go on with what was cut short there.
        progress: called with (stage, done, total).

    Raises:
        DatasetError: the data is malformed, or too little.
        ConfigError: the folder holds something else, or a number makes no sense.
        ModelLoadError: there is no such encoder or rephraser.
        FitError: a classifier's loss became NaN.
        StorageError: the folder cannot be written.
    """
    config, out = MakeEditsConfig.from_dict(nested(settings or {})), Path(out)
    name, examples = read_labelled(data)
    random.Random(f"examples {config.seed}").shuffle(examples)
    examples = examples[:count]
    labels = tuple(sorted({e.label for e in examples}, key=_order))
    if len(labels) < 2 or len(examples) < 2 * config.folds:
        raise DatasetError(
            f"{data} has {len(examples)} examples of {len(labels)} labels; {config.folds} folds "
            f"need {2 * config.folds} at least, of two labels."
        )
    check_writable(out / TOLD)
    identity = _identity(examples, config, [base, rephrase, prefix, encoder or base])
    _check_folder(out, identity, resume)
    short, shortened = cut(tokenizer_of(base), [e.text for e in examples], config.classifier.tokens)
    if shortened:
        logger.warning(
            "%d of %d texts are cut after %d tokens.",
            shortened,
            len(short),
            config.classifier.tokens,
        )
    examples = [replace(e, text=text) for e, text in zip(examples, short, strict=True)]
    coin = config.coin if config.coin is not None else name in COIN
    wording = _Wording(rephrase, prefix, encoder or base, config)
    folds = [
        _fold(out, number, examples, labels, base, config, coin, wording, progress)
        for number in range(config.folds)
    ]
    made = Made(name, labels, out, tuple(folds), shortened)
    told = {"data": name, "labels": labels, "shortened": shortened, "coin": coin}
    write_text(
        out / TOLD,
        json.dumps(
            {"identity": identity, **told, "statistics": asdict(made.statistics())}, indent=1
        ),
    )
    return made


def _fold(
    out: Path,
    number: int,
    examples: Sequence[Labelled],
    labels: Sequence[str],
    base: str | Path,
    config: MakeEditsConfig,
    coin: bool,
    wording: _Wording,
    progress: Progress,
) -> FoldStatistics:
    """Train a fold's classifier and write its cases, or read what it gave before."""
    folder, aside = out / f"fold-{number + 1}", out / f"fold-{number + 1}.part"

    def staged(stage: str, done: int, total: int) -> None:
        progress(f"fold {number + 1}: {stage}", done, total)

    if not folder.exists():
        lm = train_classifier(
            base,
            [e for i, e in enumerate(examples) if i % config.folds != number],
            labels,
            config.classifier,
            seed=config.seed,
            folder=aside / CHECKPOINTS,
            progress=staged,
        )
        lm.network.save_pretrained(make_folder(aside))
        lm.tokenizer.save_pretrained(aside)
        aside.rename(folder)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if not (folder / TOLD).exists():
        held_out = examples[number :: config.folds]
        lm = LanguageModel.load(folder)
        fails, passes, accuracy = divided(lm, held_out, config, coin=coin)
        if not fails or not passes:
            raise DatasetError(
                f"the classifier of fold {number + 1} gets {len(passes)} of {len(held_out)} texts "
                "right; there must be some of either kind. Change how long it learns "
                "(classifier.training.steps)."
            )
        fails, dropped = wording.rephrased(fails, staged)
        train_set, validation_set = _with_neighbours(fails, passes, config)
        _write_cases(folder / TRAIN, train_set)
        _write_cases(folder / VALIDATION, validation_set)
        adaptive = sum(len(case.paraphrases) for case in fails)
        found = FoldStatistics(len(held_out), accuracy, len(fails), adaptive, dropped, len(passes))
        write_text(folder / TOLD, json.dumps(asdict(found), indent=1))
    return FoldStatistics(**json.loads((folder / TOLD).read_text(encoding="utf-8")))


def divided(
    lm: LanguageModel, examples: Sequence[Labelled], config: MakeEditsConfig, *, coin: bool
) -> tuple[list[Case], list[Probe], float]:
    """X_fail as cases without paraphrases, X_pass, and how often the classifier is right.

    Args:
        lm: the classifier.
        examples: that it has not learnt from.
        config: the numbers.
        coin: draw what is to be edited by a fair coin. Then what is flipped is X_fail, and X_pass
            what is right and not flipped.
    """
    said = predictions(lm, [example.text for example in examples])
    fails, passes, right = [], [], 0
    draw = random.Random(f"coin {config.seed}")
    for number, (example, answer) in enumerate(zip(examples, said, strict=True)):
        right += answer == example.label
        wanted = example.label
        if coin:
            others = [label for label in lm.labels if label != answer]
            wanted = draw.choice(others) if draw.random() < 0.5 else answer
        if wanted != answer:
            fails.append(
                Case(example.request(wanted, answer), str(number), paraphrases=example.rephrasings)
            )
        elif answer == example.label:
            passes.append(Probe(example.text, example.label))
    return fails, passes, right / len(examples)


@dataclass
class _Wording:
    """Rephrases cases; the models that it needs are loaded when they are first needed."""

    source: str | Path
    prefix: str
    encoder: str | Path
    config: MakeEditsConfig

    @cached_property
    def rephraser(self) -> Rephraser:
        return rephraser(self.source, prefix=self.prefix, seed=self.config.seed)

    @cached_property
    def judge(self) -> SentenceEncoder:
        return SentenceEncoder.load(self.encoder)

    def rephrased(self, cases: Sequence[Case], progress: Progress) -> tuple[list[Case], int]:
        """The cases with rephrasings that are alike enough, and how many were not."""
        wanted = self.config.rephrasings
        texts = [case.request.text for case in cases]
        drawn = self.rephraser(texts, 2 * wanted, progress) if wanted else [[] for _ in texts]
        found, dropped = [], 0
        for number, (case, new) in enumerate(zip(cases, drawn, strict=True), 1):
            candidates = list(dict.fromkeys([*case.paraphrases, *new]))
            alike = similarities(
                self.judge,
                candidates,
                [case.request.text] * len(candidates),
                self.config.similarity,
            )
            good = [
                c for c, value in zip(candidates, alike, strict=True) if value >= self.config.least
            ]
            dropped += len(candidates) - len(good)
            found.append(replace(case, paraphrases=tuple(good[:wanted])))
            progress("comparing", number, len(cases))
        return found, dropped


def _with_neighbours(
    fails: Sequence[Case], passes: Sequence[Probe], config: MakeEditsConfig
) -> tuple[list[Case], list[Case]]:
    """Cases for training and for validation, each with neighbours of its own side."""
    draw = random.Random(f"neighbours {config.seed}")
    sides: list[list[Case]] = []
    for cases, probes in zip(
        _split(fails, config, draw), _split(passes, config, draw), strict=True
    ):
        count = min(config.neighbours, len(probes))
        sides.append([replace(c, neighbours=tuple(draw.sample(probes, count))) for c in cases])
    return sides[0], sides[1]


def _split(
    some: Sequence[T], config: MakeEditsConfig, draw: random.Random
) -> tuple[list[T], list[T]]:
    """For training, and for validation: one at least of either, where there are two."""
    shuffled = draw.sample(some, len(some))
    count = min(len(some) - 1, max(1, round(config.validation * len(some))))
    return shuffled[count:], shuffled[:count]


def _write_cases(path: Path, cases: Sequence[Case]) -> None:
    lines = [json.dumps(case.to_dict(), ensure_ascii=False) for case in cases]
    write_text(path, "\n".join(lines) + "\n")


def _check_folder(out: Path, identity: str, resume: bool) -> None:
    """Refuse a folder that holds something else; claim it otherwise."""
    if (out / TOLD).exists():
        before = json.loads((out / TOLD).read_text(encoding="utf-8")).get("identity")
        if before != identity:
            raise ConfigError(
                f"{out} holds edits of other data, or made with other numbers. Name another folder."
            )
        if not resume:
            raise ConfigError(f"{out} has been begun; go on with --resume, or name another folder.")
    write_text(out / TOLD, json.dumps({"identity": identity}))


def _identity(
    examples: Sequence[Labelled], config: MakeEditsConfig, sources: Sequence[object]
) -> str:
    told = [[asdict(e) for e in examples], config.to_dict(), [str(source) for source in sources]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _order(label: str) -> tuple[int, str]:
    """Numbers by size, then names by the alphabet."""
    return (int(label), "") if label.isdecimal() else (sys.maxsize, label)
