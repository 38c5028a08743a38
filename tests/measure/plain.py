"""Scoring as the reference repositories do it: the plain computation that ours must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from errata.lm.load import LanguageModel
from errata.lm.tokens import encode_answers, pad
from errata.measure.likelihood import Answer, Pair
from errata.requests import Case


@torch.no_grad()
def judge_plainly(lm: LanguageModel, pairs: Sequence[Pair]) -> list[Answer]:
    """All pairs as one right-padded batch with full logits, read one token at a time."""
    encoded = encode_answers(lm, [p for p, _ in pairs], [a for _, a in pairs])
    batch = pad(lm, [entry.ids for entry in encoded])
    logits = lm.network(input_ids=batch.ids, attention_mask=batch.mask).logits
    answers = []
    for row, entry in enumerate(encoded):
        logprobs, hits = [], []
        for offset, token in enumerate(entry.answer):
            predicted = logits[row, entry.prompt_length + offset - 1].float()
            logprobs.append(float(predicted.log_softmax(-1)[token]))
            hits.append(int(predicted.argmax()) == token)
        answers.append(Answer(tuple(logprobs), tuple(hits)))
    return answers


def pairs_of(case: Case) -> list[Pair]:
    """CounterFact's prompts of a case, each with both targets."""
    assert case.request.true is not None
    prompts = [case.request.text, *case.paraphrases]
    prompts += [probe.prompt for probe in (*case.neighbours, *case.attributes)]
    return [(p, target) for p in prompts for target in (case.request.target, case.request.true)]
