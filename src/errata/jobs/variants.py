"""Facts as other editing problems: those that the model knows, each with the variant's target.

As Hase et al. 2023 (arXiv:2301.04213) choose them: what the model writes after the prompt says what
is true, and its probability is above 0.02.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from errata.errors import RequestError
from errata.lm.generate import complete, complete_hidden
from errata.lm.load import LanguageModel
from errata.lm.tokens import encode_answers
from errata.locate.traces import Skipped
from errata.measure.metrics import reads
from errata.measure.shares import Question, probabilities
from errata.requests import Case, Request, variant_named

WRITTEN = 36
"""Tokens that the model writes, in which what is true must stand."""

LEAST = 0.02
"""What is true has a higher probability."""

REVERSED = 12
"""Tokens of a prompt with what the model says where noise hides the subject, as the code of Hase et
al. counts them; what is said has at least as many as what is true."""


def posed(
    lm: LanguageModel, cases: Sequence[Case], variant: str
) -> tuple[list[Case], list[Skipped]]:
    """The known facts among some cases as problems of one variant, and why others are none.

    Args:
        lm: the model, a decoder, as it is now.
        cases: facts whose requests tell what is true.
        variant: a name in `VARIANTS`. Its target is the case's own, what is true, or what the
            model writes where noise hides the subject.

    Raises:
        RequestError: there is no such variant.
        ConfigError: the model is not a decoder.
    """
    problem = variant_named(variant)
    known, skipped = _known(lm, cases)
    found = []
    for case in known:
        request = case.request
        target = None
        if problem.target == "hidden":
            target = _said_behind_noise(lm, request)
            if not target or reads(target, str(request.true)):
                why = f"after {request.text!r} the model says {target!r} behind noise too."
                skipped.append(Skipped(request, target, why))
                continue
        found.append(replace(case, request=request.posed(variant, target=target)))
    return found, skipped


def needs_target(variant: str) -> bool:
    """Whether a problem wants a new answer, which nobody but the user knows.

    Raises:
        RequestError: there is no such problem.
    """
    return variant_named(variant).target == "new"


def all_posed(lm: LanguageModel, cases: Sequence[Case], variant: str) -> list[Case]:
    """`posed`, of facts that were all asked for.

    Raises:
        RequestError: also if one of them cannot be posed so.
    """
    found, skipped = posed(lm, cases, variant)
    if skipped:
        raise RequestError(
            f"{len(skipped)} of {len(cases)} facts cannot be posed as {variant}: {skipped[0].why}"
        )
    return found


def _said_behind_noise(lm: LanguageModel, request: Request) -> str:
    (row,) = encode_answers(lm, [request.text], [str(request.true)])
    room = max(REVERSED - row.prompt_length, len(row.answer))
    return complete_hidden(lm, [request], new_tokens=room)[0].strip()


def _known(lm: LanguageModel, cases: Sequence[Case]) -> tuple[list[Case], list[Skipped]]:
    """The cases whose fact the model knows, and why it does not know the others."""
    told = [case for case in cases if case.request.true is not None]
    texts = [case.request.text for case in told]
    written = complete(lm, texts, new_tokens=WRITTEN) if told else []
    asked = [Question(case.request.text, str(case.request.true)) for case in told]
    likely = probabilities(lm, asked)
    said = {id(case): (text, p) for case, text, p in zip(told, written, likely, strict=True)}
    known: list[Case] = []
    skipped: list[Skipped] = []
    for case in cases:
        request = case.request
        if id(case) not in said:
            why = f"what is true after {request.text!r} is not told."
            skipped.append(Skipped(request, "", why))
            continue
        text, p = said[id(case)]
        if str(request.true).strip() in text and p > LEAST:
            known.append(case)
        else:
            why = (
                f"after {request.text!r} the model says {text.strip()!r}; {request.true!r} has "
                f"probability {p:.3f}."
            )
            skipped.append(Skipped(request, text.strip(), why))
    return known, skipped
