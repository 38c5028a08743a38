"""What a learnt editor is to achieve: the outer loss, on the models that it has edited.

For each case, the editor changes the model from the request alone. Of the model so edited

    loss = c_edit * NLL(answer | other wording)  +  c_kept * KL(unedited || edited | neighbour)

with the wording drawn from the request and its paraphrases (SaLEM's X_fail and X_adapt) and the
divergence taken over the whole distribution at each token of a neighbour's answer, or over labels
(X_pass). All edited models of a batch run in one pass, each row with its own change.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.editors.config import Config
from errata.editors.hypernet.applied import low_rank_applied
from errata.editors.hypernet.gradients import Factors
from errata.editors.wordings import drawn, example, neighbours, wordings
from errata.lm.forward import frozen
from errata.lm.load import LanguageModel
from errata.lm.loss import Answers, Example, answer_logits
from errata.requests import Case


@dataclass(frozen=True)
class ObjectiveConfig(Config):
    """How much of what counts."""

    edit: float = 0.1
    """c_edit, of the answers that are wanted (both papers)."""
    kept: float = 1.0
    """c_kept, of the answers that must stay (both papers)."""
    wordings: int = 1
    """How many of a case's request and paraphrases are asked in a step."""
    neighbours: int = 1
    """How many of its neighbours are asked in a step."""

    def __post_init__(self) -> None:
        """Refuse what would teach nothing."""
        super().__post_init__()
        self._not_negative("edit", "kept")
        self._positive("wordings", "neighbours")


@dataclass(frozen=True)
class Questions:
    """What a batch of n cases is asked in one step, with the number of its case beside each."""

    edits: list[Example]
    """(n) what the editor sees."""
    wanted: list[Example]
    wanted_of: list[int]
    kept: list[Example]
    kept_of: list[int]

    @classmethod
    def of(cls, cases: Sequence[Case], draw: random.Random, config: ObjectiveConfig) -> Questions:
        """Draw the wordings and neighbours of some cases."""
        made = cls([example(case.request) for case in cases], [], [], [], [])
        for number, case in enumerate(cases):
            some = drawn(wordings(case), config.wordings, draw)
            made.wanted.extend(some)
            made.wanted_of.extend([number] * len(some))
            if config.kept:
                some = drawn(neighbours(case), config.neighbours, draw)
                made.kept.extend(some)
                made.kept_of.extend([number] * len(some))
        return made


def outer_loss(
    lm: LanguageModel,
    questions: Questions,
    changes: Mapping[str, Factors],
    config: ObjectiveConfig,
    *,
    before: Answers | None = None,
) -> dict[str, Tensor]:
    """The loss of n edited models, with gradient for their changes.

    Args:
        lm: the unedited model.
        questions: what the n cases ask.
        changes: the n changes of each edited matrix.
        config: what counts how much.
        before: what neighbours were answered, if not as `lm` answers them now.

    Returns:
        `loss`, and what it is made of: `edit`, the mean NLL; `kept`, the mean divergence (0 where
        nothing is asked); `accuracy`, the share of wanted answers that come, every token of them.
    """
    asked = [*questions.wanted, *questions.kept]
    owner = torch.tensor([*questions.wanted_of, *questions.kept_of])
    with frozen(lm):
        if before is None and questions.kept:
            with torch.no_grad():
                before = answer_logits(lm, questions.kept)
        with low_rank_applied(lm, changes, owner):
            after = answer_logits(lm, asked)
    new, old = after.split(len(questions.wanted))
    edit = new.losses().mean()
    kept = edit.new_zeros(())
    if before is not None:
        kept = before.averaged(divergence(before, old)).mean()
    return {
        "loss": config.edit * edit + config.kept * kept,
        "edit": edit,
        "kept": kept,
        "accuracy": new.right().float().mean(),
    }


def divergence(before: Answers, after: Answers) -> Tensor:
    """(m,) KL(before || after) at each place, over everything that could be answered there."""
    dtype = torch.promote_types(before.logits.dtype, torch.float32)
    return functional.kl_div(
        after.logits.to(dtype).log_softmax(-1),
        before.logits.to(dtype).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
