"""What a case asks of an editor that learns: its wordings, its neighbours, some of them drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence

from errata.lm.loss import Example
from errata.requests import Case, Request


def example(request: Request) -> Example:
    """What a model is asked and should answer."""
    return Example(request.text, request.target)


def wordings(case: Case) -> list[Example]:
    """All prompts after which a case's answer should come."""
    prompts = [case.request.text, *case.paraphrases]
    return [Example(prompt, case.request.target) for prompt in prompts]


def neighbours(case: Case) -> list[Example]:
    """All answers that a case should leave as they are."""
    return [Example(probe.prompt, probe.answer) for probe in case.neighbours]


def drawn(some: Sequence[Example], count: int, draw: random.Random) -> list[Example]:
    """`count` different ones, or all there are."""
    return draw.sample(some, min(count, len(some)))
