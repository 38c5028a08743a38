"""Corrections for the model of `trained_folder`, and an editor that is quickly fitted to it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from errata.editors.trainable import TrainingCases
from errata.requests import Case, Probe, Request
from tests.conftest import CAPITALS, TEMPLATES

QUICK: dict[str, Any] = {
    "network": {"rank": 32, "learning_rate": 0.1, "step_learning_rate": 0.3},
    "training": {"steps": 120, "validate_every": 20},
}
"""Numbers with which a few seconds are enough."""


def capital_cases() -> list[Case]:
    """Each country with each other capital; asked in other words, others' capitals must stay."""
    return [
        Case(
            Request(TEMPLATES[0], country, new, true),
            case_id=f"{country}: {new}",
            paraphrases=tuple(template.format(country) for template in TEMPLATES[1:]),
            neighbours=tuple(
                Probe(template.format(other), capital)
                for other, capital in CAPITALS.items()
                if other != country
                for template in TEMPLATES[:2]
            ),
        )
        for country, true in CAPITALS.items()
        for new in CAPITALS.values()
        if new != true
    ]


def divided() -> TrainingCases:
    """A fifth of them to validate with; of so few countries none is kept back whole."""
    cases = capital_cases()
    random.Random("split 0").shuffle(cases)
    count = round(0.2 * len(cases))
    return TrainingCases(tuple(cases[count:]), tuple(cases[:count]))


def killed(folder: Path, checkpoints: Path) -> str:
    """A program that fits MEND to the model of `folder`, and dies at step 50."""
    return f"""
import os, signal
from pathlib import Path
from errata.editors.background import Background
from errata.editors.hypernet.mend import Mend, MendConfig
from errata.lm.load import LanguageModel
from tests.editors.hypernet.capitals import QUICK, divided

def progress(stage, done, total):
    if stage == "steps" and done == 50:
        os.kill(os.getpid(), signal.SIGKILL)

mend = Mend(MendConfig.from_dict(QUICK), Background())
lm = LanguageModel.load(Path({str(folder)!r}))
mend.fit(lm, divided(), folder=Path({str(checkpoints)!r}), progress=progress)
"""
