"""What a model says, before and after an edit, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from errata.edits.edit import Edit
from errata.jobs.models import Model, as_model
from errata.jobs.record import Fact, Kind, Said
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.progress import Progress, silent
from errata.requests import Case

ANSWER_TOKENS = 12
"""How far the model writes on in a table; enough for a name and what follows it."""


@dataclass(frozen=True)
class Answer:
    """A prompt with its continuations."""

    prompt: str
    before: str
    after: str | None = None


def ask(
    model: Model,
    prompts: Sequence[str],
    edit: Edit | None = None,
    *,
    new_tokens: int = 40,
    top_k: int = 0,
    seed: int = 0,
) -> list[Answer]:
    """Let the model write on from each prompt, unedited and, if there is one, with the edit.

    Args:
        model: the model or its name.
        prompts: where to begin.
        edit: what to apply for the second answer.
        new_tokens: how far to write.
        top_k: sample among the k likeliest tokens; 0 takes the likeliest.
        seed: of the sampling; both answers start from it.

    Raises:
        WrongModelError: the edit was made for another model.
        TokenizationError: a prompt is too long.
    """
    lm = as_model(model)
    before = complete(lm, prompts, new_tokens=new_tokens, top_k=top_k, seed=seed)
    if edit is None:
        return [Answer(p, b) for p, b in zip(prompts, before, strict=True)]
    with edit.applied(lm):
        after = complete(lm, prompts, new_tokens=new_tokens, top_k=top_k, seed=seed)
    return [Answer(*row) for row in zip(prompts, before, after, strict=True)]


def facts_of(cases: Sequence[Case], *, per_kind: int = 3) -> list[Fact]:
    """What to ask about each case: its prompt and at most `per_kind` of each other kind."""
    facts = []
    for case in cases:
        request = case.request
        asked: list[tuple[Kind, str, str]] = [("prompt", request.text, request.target)]
        asked += [("paraphrase", text, request.target) for text in case.paraphrases[:per_kind]]
        asked += [("neighbour", p.prompt, p.answer) for p in case.neighbours[:per_kind]]
        asked += [("same subject", p.prompt, p.answer) for p in case.same_subject[:per_kind]]
        facts.append(
            Fact(
                request.subject,
                request.prompt,
                request.wish,
                request.true,
                tuple(
                    Said(
                        kind,
                        prompt,
                        wanted,
                        before="",
                        unwanted=request.problem.minimised and kind in ("prompt", "paraphrase"),
                    )
                    for kind, prompt, wanted in asked
                ),
            )
        )
    return facts


def answered(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    edited: bool,
    stage: str = "asking",
    progress: Progress = silent,
) -> list[Fact]:
    """The facts with what the model says now, as what it said before or, if `edited`, after."""
    prompts = [said.prompt for fact in facts for said in fact.said]
    distinct = list(dict.fromkeys(prompts))
    texts: dict[str, str] = {}
    for start in range(0, len(distinct), 64):
        progress(stage, start, len(distinct))
        group = distinct[start : start + 64]
        texts |= zip(group, complete(lm, group, new_tokens=ANSWER_TOKENS), strict=True)
    progress(stage, len(distinct), len(distinct))
    return [
        replace(fact, said=tuple(_with(said, texts[said.prompt], edited) for said in fact.said))
        for fact in facts
    ]


def _with(said: Said, text: str, edited: bool) -> Said:
    return replace(said, after=text) if edited else replace(said, before=text)
