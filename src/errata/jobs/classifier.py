"""Training a classifier from any encoder: the base model whose mistakes `errata make-edits` finds.

The encoder's lower blocks may be left as they are: they then run without gradient, which saves most
of the time. The outer loop is that of learnt editors, with its checkpoints, early stopping and
seeds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from errata.editors.config import Config
from errata.editors.trainable import TrainingCases
from errata.editors.training import Learner, TrainingConfig, train
from errata.errors import ConfigError, ModelLoadError
from errata.lm.load import LanguageModel
from errata.lm.loss import Example, losses
from errata.lm.quiet import no_weights_bar
from errata.measure.datasets.labelled import Labelled
from errata.progress import Progress, silent
from errata.requests import Case


@dataclass(frozen=True)
class ClassifierConfig(Config):
    """Numbers of the training."""

    rate: float = 1e-4
    """Adam's learning rate."""
    head_rate: float = 1e-3
    """That of the new head, which begins at random."""
    blocks: int | None = None
    """How many of the upper blocks learn; all, with the embedding, by default."""
    tokens: int = 64
    """Longer texts are cut after so many."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=400,
            batch=32,
            at_once=32,
            clip=1.0,
            validate_every=50,
            validation=200,
            patience=150,
        )
    )

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        self._positive("rate", "head_rate")
        self._require(self.tokens > 2, f"tokens must be more than 2, got {self.tokens}.")
        blocks = self.blocks
        self._require(blocks is None or blocks >= 0, f"blocks must not be negative, got {blocks}.")


def train_classifier(
    base: str | Path,
    examples: Sequence[Labelled],
    labels: Sequence[str],
    config: ClassifierConfig,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress = silent,
) -> LanguageModel:
    """Fine-tune an encoder, with a new head, to tell labels of texts.

    Args:
        base: the encoder's folder or Hub name.
        examples: nine in ten to learn from, the others to say when to stop.
        labels: all labels there are, in the order of the logits.
        config: the numbers.
        seed: of the head, of the order of examples, and of dropout.
        folder: where the checkpoint is kept; a training that was cut short there goes on.
        progress: called with steps done.

    Raises:
        ModelLoadError: there is no such encoder.
        FitError: the loss became NaN, or the folder's checkpoint is of another training.
    """
    lm = new_classifier(base, labels, seed=seed)
    cases = [Case(example.request(example.label)) for example in examples]
    train(
        ClassifierLearner(lm, config),
        TrainingCases.split(cases, seed=seed),
        config.training,
        seed=seed,
        folder=folder,
        identity={
            "base": str(base),
            "labels": list(labels),
            "blocks": config.blocks,
            "rates": [config.rate, config.head_rate],
        },
        progress=progress,
    )
    lm.network.requires_grad_(True).eval()
    return lm


def new_classifier(base: str | Path, labels: Sequence[str], *, seed: int = 0) -> LanguageModel:
    """An encoder with a head of random weights, drawn by the seed.

    Raises:
        ModelLoadError: there is no such encoder, or it comes without safetensors weights.
    """
    names = dict(enumerate(labels))
    tokenizer = tokenizer_of(base)
    try:
        with torch.random.fork_rng(), no_weights_bar():
            torch.manual_seed(seed)
            network = AutoModelForSequenceClassification.from_pretrained(
                str(base),
                id2label=names,
                label2id={name: number for number, name in names.items()},
                problem_type="single_label_classification",
                use_safetensors=True,
                dtype=torch.float32,
                **_where(base),
            )
    # Parsers and readers below (tokenizers, safetensors, huggingface_hub) raise what they like.
    except Exception as error:
        raise _no_encoder(base, error) from error
    return LanguageModel.of(network, tokenizer, name=str(base))


def tokenizer_of(base: str | Path) -> PreTrainedTokenizerBase:
    """An encoder's tokenizer.

    Raises:
        ModelLoadError: there is no such encoder.
    """
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base), **_where(base))
    except Exception as error:  # as above
        raise _no_encoder(base, error) from error
    return found


def cut(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int
) -> tuple[list[str], int]:
    """Each text up to where its first `tokens` tokens end, special ones included; how many are cut.

    Raises:
        ModelLoadError: the tokenizer gives no character offsets (it is not a fast one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(f"{type(tokenizer).__name__} is not a fast tokenizer.")
    told = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    special = tokenizer.num_special_tokens_to_add()
    shorter, count = [], 0
    for text, row in zip(texts, told["offset_mapping"], strict=True):
        if len(row) > tokens:
            ends = [end for begin, end in row if end > begin]  # special tokens are empty
            text, count = text[: ends[max(0, tokens - special - 1)]], count + 1
        shorter.append(text)
    return shorter, count


def _where(base: str | Path) -> dict[str, Any]:
    return {"local_files_only": Path(base).is_dir(), "trust_remote_code": False}


def _no_encoder(base: str | Path, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"cannot load the encoder {str(base)!r}: {error}\n"
        "  Give a folder with config.json, tokenizer files and safetensors weights, or a Hub name "
        "(needs a network)."
    )


class ClassifierLearner(Learner):
    """The parts of a classifier that learn, as the outer loop trains them."""

    def __init__(self, lm: LanguageModel, config: ClassifierConfig) -> None:
        """Train the upper part of `lm` in place.

        Raises:
            ConfigError: it has fewer blocks than shall learn.
        """
        super().__init__()
        blocks = lm.layers if config.blocks is None else config.blocks
        if blocks > lm.layers:
            raise ConfigError(f"{lm.name} has {lm.layers} blocks; {blocks} cannot learn.")
        self.lm, self.config = lm, config
        # Networks list their parameters in the order in which they run.
        still = 0
        listed = list(lm.network.named_parameters())
        if config.blocks is not None:
            below = [*map(lm.block, range(lm.layers - blocks)), lm.embedding]
            inside = {id(p) for module in below for p in module.parameters()}
            still = 1 + max(i for i, (_, p) in enumerate(listed) if id(p) in inside)
        for _, parameter in listed[:still]:
            parameter.requires_grad_(False)
        self.learning = nn.ParameterDict(
            {name.replace(".", "/"): parameter for name, parameter in listed[still:]}
        )
        body = {id(p) for p in lm.network.base_model.parameters()}
        self.head = {name for name, p in self.learning.items() if id(p) not in body}

    def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        """Cross-entropy of the labels; in training with dropout, drawn by `draw`."""
        examples = [Example(case.request.text, case.request.target) for case in cases]
        self.lm.network.train(self.training)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(draw.getrandbits(63))
                return {"loss": losses(self.lm, examples).mean()}
        finally:
            self.lm.network.eval()

    def rates(self) -> Mapping[str, float]:
        """Adam's learning rate for each parameter."""
        return {
            f"learning.{name}": self.config.head_rate if name in self.head else self.config.rate
            for name in self.learning
        }
