"""Causal tracing (Meng et al. 2022, section 2): which states carry a fact to its answer?

Three runs: the clean one says the answer with probability P; in the corrupted one noise hides the
subject's token embeddings, and P* is left; in the restored one a single state of the corrupted run,
or a window of MLP or attention outputs at one token, is put back to its clean value. How much of
the probability comes back tells how much that place matters:

    total effect = P - P*,    indirect effect = P_restored - P*

Probabilities are means over several samples of noise. That of an answer of several tokens is the
product of theirs, each read after the answer's earlier tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from errata.errors import ConfigError, NotFiniteError, RequestError
from errata.lm.forward import logits_at
from errata.lm.load import LanguageModel
from errata.lm.noise import Noise, embedding_spread, noise_level
from errata.lm.tokens import Encoded, encode_requests, pad
from errata.lm.weights import weight_out_in
from errata.locate.restoration import Runs
from errata.locate.traces import (
    KINDS,
    AverageEffect,
    Kind,
    Part,
    Skipped,
    Trace,
    Traces,
    average,
)
from errata.progress import Progress, silent
from errata.requests import INJECTION, Request

__all__ = [
    "KINDS",
    "AverageEffect",
    "Kind",
    "Noise",
    "Part",
    "Skipped",
    "Trace",
    "Traces",
    "average",
    "embedding_spread",
    "trace",
    "trace_all",
]


def trace(
    lm: LanguageModel,
    request: Request,
    *,
    kind: Kind = "state",
    window: int = 10,
    severed: Part | None = None,
    noise: Noise | None = None,
    spread: float | None = None,
    answer: str | None = None,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> Trace:
    """Trace one fact: the effect of restoring each token of the prompt at each layer.

    Args:
        lm: the model; a decoder. It is left as it is.
        request: prompt and subject; what it wants and holds for true play no part.
        kind: what is restored: a block's output ("state"), or the outputs of the MLPs or attentions
            of a window of layers around each layer.
        window: of how many layers: layer l stands for l - window // 2 up to, and without,
            l + ceil(window / 2). Of no effect on states.
        severed: while a state is restored, keep the outputs of this part at the same token and in
            the layers above at their corrupted values.
        noise: what hides the subject; by default three standard deviations, ten samples.
        spread: the standard deviation of embeddings that noise is a multiple of; by default that of
            the request's own subject.
        answer: whose probability is told; by default the model's likeliest next token.
        batch_tokens: at most so many tokens are computed at once, but always a clean and a
            corrupted row.
        progress: told how many layers are done.

    Raises:
        ConfigError: settings are unknown or contradict each other, or the model is not a decoder.
        RequestError: the answer is empty.
        TokenizationError: the subject or answer has no token of its own, or the text is too long.
        NotFiniteError: the model's weights, or an edit on them, hold NaN or infinity.
    """
    lm.require_decoder("causal tracing")
    _check([kind], window, severed)
    noise = noise or Noise()
    level = noise_level(lm, [request.subject], noise, spread)
    fact = _Fact.of(lm, request, answer)
    runs = fact.runs(noise, level, batch_tokens)
    return fact.trace(runs, kind, window, severed, noise, level, progress)


def trace_all(
    lm: LanguageModel,
    requests: Sequence[Request],
    *,
    kinds: Sequence[Kind] = KINDS,
    window: int = 10,
    severed: Part | None = None,
    noise: Noise | None = None,
    spread: float | None = None,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> Traces:
    """Trace many facts, each by every kind of restoration.

    A fact's answer is what its request holds for true, and the model must say it, token by token;
    a fact that it does not know is skipped, and told with what the model says instead. Where a
    request holds nothing for true, the model's likeliest next token is the answer.

    Args:
        lm: as for `trace`, like all that is not named here.
        requests: the facts.
        kinds: what is restored.
        window: of the MLPs and attentions.
        severed: for kind "state" alone.
        noise: the same draws for each fact.
        spread: by default that of the subjects of all requests together.
        batch_tokens: of each pass.
        progress: told how many facts are done.

    Raises:
        RequestError: there is no request.
        ConfigError, TokenizationError, NotFiniteError: as for `trace`.
    """
    lm.require_decoder("causal tracing")
    _check(kinds, window, severed)
    if not requests:
        raise RequestError("there is no request to trace.")
    noise = noise or Noise()
    level = noise_level(lm, [request.subject for request in requests], noise, spread)
    traces: list[Trace] = []
    skipped: list[Skipped] = []
    progress("tracing", 0, len(requests))
    for done, request in enumerate(requests, 1):
        fact = _Fact.of(lm, request, request.true)
        if fact.known:
            runs = fact.runs(noise, level, batch_tokens)
            traces += [
                fact.trace(runs, kind, window, severed, noise, level, silent) for kind in kinds
            ]
        else:
            why = f"after {request.text!r} the model says {fact.says!r}, not {request.true!r}."
            skipped.append(Skipped(request, fact.says, why))
        progress("tracing", done, len(requests))
    return Traces(tuple(traces), tuple(skipped))


@dataclass(frozen=True)
class _Fact:
    """A prompt with its answer, and what the model says by itself in as many tokens."""

    lm: LanguageModel
    request: Request
    row: Encoded
    predicted: list[int]

    @classmethod
    def of(cls, lm: LanguageModel, request: Request, answer: str | None) -> Self:
        """Read the prompt; the answer is the likeliest next token if None is given."""
        if answer is None:
            (row,) = encode_requests(lm, [request], target=False)
            predicted = _continuation(lm, row.ids, 1)
            return cls(lm, request, replace(row, ids=row.ids + predicted), predicted)
        (row,) = encode_requests(lm, [replace(request, target=answer, variant=INJECTION)])
        predicted = _continuation(lm, row.ids[: row.prompt_length], len(row.answer))
        return cls(lm, request, row, predicted)

    @property
    def known(self) -> bool:
        """Whether the model says the answer by itself."""
        return self.predicted == self.row.answer

    @property
    def says(self) -> str:
        """What it says."""
        return _text(self.lm, self.predicted).strip()

    def runs(self, noise: Noise, level: float, batch_tokens: int) -> list[Runs]:
        """The clean and corrupted runs, in groups of as many samples as `batch_tokens` holds."""
        row, width = self.row, weight_out_in(self.lm.embedding).shape[1]
        drawn = level * noise.draw(row.subject_last + 1 - row.subject_first, width)
        samples = max(1, batch_tokens // (len(row.ids) - 1) - 1)
        return [
            Runs.of(self.lm, row, part, replace=noise.replace, batch_tokens=batch_tokens)
            for part in torch.split(torch.from_numpy(drawn), samples)
        ]

    def trace(
        self,
        runs: Sequence[Runs],
        kind: Kind,
        window: int,
        severed: Part | None,
        noise: Noise,
        level: float,
        progress: Progress,
    ) -> Trace:
        """All restorations of one kind."""
        restored = [run.restored(kind, window, severed, progress) for run in runs]
        probabilities = torch.cat(restored, dim=2).mean(dim=2)
        _require_numbers(self.lm, probabilities)
        row = self.row
        return Trace(
            request=self.request,
            tokens=tuple(_text(self.lm, [id_]) for id_ in row.ids[: row.prompt_length]),
            subject=(row.subject_first, row.subject_last),
            answer=_text(self.lm, row.answer).strip(),
            predicted=self.says,
            kind=kind,
            window=1 if kind == "state" else window,
            severed=severed,
            clean=runs[0].clean,
            corrupted=float(torch.cat([run.corrupted for run in runs]).mean()),
            probabilities=tuple(map(tuple, probabilities.tolist())),
            noise=noise,
            level=level,
            model=self.lm.name,
        )


def _check(kinds: Collection[str], window: int, severed: str | None) -> None:
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise ConfigError(f"what is restored is some of {', '.join(KINDS)}, not {list(kinds)}.")
    if window < 1:
        raise ConfigError(f"a window has at least one layer, not {window}.")
    if severed not in (None, "mlp", "attention"):
        raise ConfigError(f"what is severed is 'mlp' or 'attention', not {severed!r}.")
    if severed and set(kinds) != {"state"}:
        raise ConfigError(
            f"the {severed} can be severed while states are restored, not with {list(kinds)}; ask "
            "for kind 'state' alone."
        )


@torch.no_grad()
def _continuation(lm: LanguageModel, ids: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest next tokens, one after another."""
    row, first = list(ids), torch.tensor([0])
    for _ in range(count):
        logits = logits_at(lm, pad(lm, [row]), first, torch.tensor([len(row) - 1]))
        _require_numbers(lm, logits)
        row.append(int(logits.argmax()))
    return row[len(ids) :]


def _require_numbers(lm: LanguageModel, values: Tensor) -> None:
    if values.isnan().any():
        lm.check_finite()  # names the weight
        raise NotFiniteError(
            f"{lm.name} gives probabilities that are not finite: its dtype overflows. Load it in "
            "float32 or bfloat16."
        )


def _text(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(ids)))
