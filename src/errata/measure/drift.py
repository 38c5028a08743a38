"""How far an edit moved everything else: KL divergence and perplexity.

`observe` notes what the unedited model predicts; `drift` compares an edited model with it:

    before = observe(lm, neighbour_prompts, neutral_texts)
    with edit.applied(lm):
        print(drift(lm, before).summary())

To a memory beside the weights, a prompt is a prompt, and a text one that ends in its middle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.lm.forward import logits_at
from errata.lm.load import LanguageModel
from errata.lm.prompts import halves
from errata.lm.tokens import batches, encode, pad
from errata.measure.likelihood import not_finite
from errata.measure.metrics import Estimate, interval
from errata.progress import Progress, silent

_BATCH_TOKENS = 1024
"""Every token of a text needs logits: 200 MB at a vocabulary of 50,000."""


@dataclass(frozen=True)
class Observation:
    """What a model predicts next after each prompt and after each token of the texts."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids; only what follows the last token is observed."""
    texts: tuple[tuple[int, ...], ...]
    """Token ids, in windows that the model can read; each token but the first is predicted."""
    nll: Tensor
    """(predictions,) of the token that follows; 0 for the prompts, which come first."""
    slot: Tensor
    """(predictions,) the row in `distributions`, or -1 where only the NLL is kept."""
    distributions: Tensor
    """(kept, vocab) log-probabilities in float32."""

    @property
    def nbytes(self) -> int:
        """Memory held, nearly all of it distributions."""
        return self.nll.nbytes + self.slot.nbytes + self.distributions.nbytes


@dataclass(frozen=True)
class Drift:
    """KL(unedited || edited) of next tokens in nats, and perplexity, each with its interval.

    The intervals take prompts, and tokens of the texts, for independent; n counts them.
    """

    prompts: Estimate | None
    texts: Estimate | None
    perplexity_before: Estimate | None
    perplexity_after: Estimate | None

    def summary(self) -> dict[str, Estimate]:
        """The numbers by the names that tables print; absent where there was nothing to measure."""
        named = {
            "KL neighbours": self.prompts,
            "KL text": self.texts,
            "perplexity before": self.perplexity_before,
            "perplexity after": self.perplexity_after,
        }
        return {name: estimate for name, estimate in named.items() if estimate}


def observe(
    lm: LanguageModel,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    limit: int = 1024,
    window: int = 512,
    seed: int = 0,
    batch_tokens: int = _BATCH_TOKENS,
    progress: Progress = silent,
) -> Observation:
    """Note what the model, unedited, predicts.

    Args:
        lm: the model.
        prompts: such as the neighbours of all cases.
        texts: neutral text.
        limit: whole distributions are kept for at most so many distinct prompts and so many tokens
            of the texts, sampled beyond that: 4 bytes x vocabulary each.
        window: longer texts are cut into windows of so many tokens.
        seed: of the sampling.
        batch_tokens: at most so many tokens in one forward pass.
        progress: called with rows done.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
        RequestError: there is nothing to predict.
        TokenizationError: a prompt is too long for the model.
        ConfigError: the model is not a decoder.
    """
    lm.require_decoder("drift")
    rng = random.Random(seed)
    distinct = list(dict.fromkeys(prompts))
    chosen = rng.sample(distinct, min(limit, len(distinct)))
    rows = [tuple(row) for row in encode(lm, chosen) if row]
    windows = _windows(lm, texts, window)
    tokens = sum(len(row) - 1 for row in windows)
    if not rows and not tokens:
        raise RequestError("drift needs prompts or texts to be measured on; there are none.")
    nll, slot = torch.zeros(len(rows) + tokens), torch.full((len(rows) + tokens,), -1)
    kept = [*range(len(rows)), *sorted(rng.sample(range(tokens), min(limit, tokens)))]
    kept[len(rows) :] = [len(rows) + token for token in kept[len(rows) :]]
    slot[kept] = torch.arange(len(kept))
    distributions = torch.empty(0)
    observed = Observation(tuple(rows), tuple(windows), nll, slot, distributions)
    for where, logprobs, losses in _predictions(lm, observed, batch_tokens, progress):
        if not distributions.numel():
            distributions = torch.empty(len(kept), logprobs.shape[1])
        nll[where] = losses
        here = slot[where]
        distributions[here[here >= 0]] = logprobs[here >= 0].cpu()
    return Observation(tuple(rows), tuple(windows), nll, slot, distributions)


def drift(
    lm: LanguageModel,
    before: Observation,
    *,
    batch_tokens: int = _BATCH_TOKENS,
    progress: Progress = silent,
) -> Drift:
    """Compare the model as it is now with what was observed before.

    Args:
        lm: the model, edited.
        before: the observation of the unedited model.
        batch_tokens: at most so many tokens in one forward pass.
        progress: called with rows done.

    Raises:
        NotFiniteError: the model gives NaN or infinity.
    """
    nll = torch.zeros_like(before.nll)
    kl = torch.zeros(len(before.distributions))
    for where, logprobs, losses in _predictions(lm, before, batch_tokens, progress):
        nll[where] = losses
        here = before.slot[where]
        base = before.distributions[here[here >= 0]].to(logprobs.device)
        kl[here[here >= 0]] = (base.exp() * (base - logprobs[here >= 0])).sum(-1).cpu()
    count = len(before.prompts)
    return Drift(
        prompts=_mean(kl[:count]),
        texts=_mean(kl[count:]),
        perplexity_before=_perplexity(before.nll[count:]),
        perplexity_after=_perplexity(nll[count:]),
    )


def _mean(values: Tensor) -> Estimate | None:
    return interval(values.tolist()) if len(values) else None


def _perplexity(nll: Tensor) -> Estimate | None:
    loss = _mean(nll)
    return loss and Estimate(math.exp(loss.mean), math.exp(loss.low), math.exp(loss.high), loss.n)


def _windows(lm: LanguageModel, texts: Sequence[str], window: int) -> list[tuple[int, ...]]:
    size = min(window, lm.max_length)
    ids = [i for text in texts for i in _pieces(lm.tokenizer(text)["input_ids"], size)]
    return [row for row in ids if len(row) > 1]


def _pieces(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]


@torch.no_grad()
def _predictions(
    lm: LanguageModel, observed: Observation, batch_tokens: int, progress: Progress
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Predictions batch by batch: their numbers (m,), log-probabilities (m, vocab), NLL (m,)."""
    rows = [*observed.prompts, *observed.texts]
    prompts = len(observed.prompts)
    columns = [
        range(len(row) - 1, len(row)) if number < prompts else range(len(row) - 1)
        for number, row in enumerate(rows)
    ]
    ends = [*(len(row) - 1 for row in observed.prompts), *halves(observed.texts)]
    start = torch.tensor([0, *(len(c) for c in columns)]).cumsum(0).tolist()
    done = 0
    for group in batches([len(row) for row in rows], batch_tokens):
        places = [(place, column) for place, row in enumerate(group) for column in columns[row]]
        at = torch.tensor(places)
        batch = pad(lm, [rows[row] for row in group])
        logits = logits_at(lm, batch, at[:, 0], at[:, 1], [ends[row] for row in group])
        logprobs = logits.float().log_softmax(-1)
        if not logprobs.isfinite().all():
            raise not_finite(lm)
        where = torch.tensor([start[row] + i for row in group for i in range(len(columns[row]))])
        following = [
            -1 if group[place] < prompts else rows[group[place]][column + 1]
            for place, column in places
        ]
        target = torch.tensor(following, device=logprobs.device)
        loss = -logprobs.gather(1, target.clamp(min=0)[:, None])[:, 0]
        yield where, logprobs, torch.where(target < 0, 0.0, loss).cpu()
        done += len(group)
        progress("drift", done, len(rows))
