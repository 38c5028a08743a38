"""Attribution: each MLP neuron's share in an answer's probability (Dai et al. 2022).

A neuron is one entry of what goes into a block's last MLP matrix. Its attribution is by integrated
gradients of the answer's probability P over the activations a of its whole layer, from zero to what
they are, at the position where the answer is predicted:

    attribution_i = a_i / m  *  sum over j = 1..m of  dP / da_i  at  a * j / m

the paper's Riemann sum, which takes the right end of each step (the authors' code takes the left
ends, j = 0..m-1; EleutherAI's port m points from end to end). Over a layer the attributions add up
to P(a) - P(0), the better the more steps there are. A decoder predicts at the last token before the
answer, a masked encoder at the mask; an answer of several tokens is taken token by token (a decoder
sees the true tokens before, an encoder masks), and the attributions are averaged.

All layers, steps and tokens are run side by side. In a decoder each run is one token on the clean
pass's key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.errors import ConfigError, NotFiniteError
from errata.lm.forward import frozen, logits_at, pause
from errata.lm.hooks import Captured, captured, rewritten_input
from errata.lm.load import LanguageModel
from errata.lm.tokens import Batch, encode_answers, encode_masked, pad


def attribution(
    lm: LanguageModel, prompt: str, answer: str, *, steps: int = 20, batch_tokens: int = 2048
) -> Tensor:
    """(layers, d_ff) each neuron's share in the answer's probability, the mean over its tokens.

    Args:
        lm: a decoder or a masked encoder; it is left as it is.
        prompt: what is asked.
        answer: what follows, or stands at the mask.
        steps: of the Riemann sum.
        batch_tokens: at most so many tokens, cached ones included, in one pass.

    Raises:
        ConfigError: the model is of another kind, or there is no step.
        NotFiniteError: an attribution is NaN or infinite.
        TokenizationError: the prompt or answer has no token of its own, or the text is too long.
    """
    if steps < 1:
        raise ConfigError(f"integrated gradients need at least one step, got {steps}.")
    asked = _asked(lm, prompt, answer)
    pairs = torch.cartesian_prod(torch.arange(len(asked.answer)), torch.arange(lm.layers))
    ramp = torch.arange(1, steps + 1, device=asked.activations.device) / steps
    scores = torch.zeros_like(asked.activations[0])
    with frozen(lm):
        for some in torch.split(pairs, max(1, batch_tokens // (steps * asked.width))):
            tokens, layers = some.T
            whole = asked.activations[tokens, layers]
            points = (ramp[:, None] * whole[:, None]).flatten(0, 1).requires_grad_()
            token, layer = tokens.repeat_interleave(steps), layers.repeat_interleave(steps)
            with ExitStack() as stack:
                for one in layers.unique().tolist():
                    rows = (layer == one).nonzero()[:, 0]
                    place = _placed(points, rows, asked.columns[token[rows]])
                    stack.enter_context(rewritten_input(lm.mlp_out(one), place))
                logits = asked.run(token)
            wanted = asked.answer[token].to(logits.device)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            probability = logits.softmax(dim=1).gather(1, wanted[:, None])
            (slopes,) = torch.autograd.grad(probability.sum(), points)
            mean = slopes.reshape(len(some), steps, -1).mean(dim=1)
            scores.index_add_(0, layers.to(scores.device), whole * mean)
    if not scores.isfinite().all():
        lm.check_finite()
        raise NotFiniteError(
            f"attributions of {answer!r} after {prompt!r} are not finite: the dtype of {lm.name} "
            "overflows (try float32 or bfloat16)."
        )
    return scores.cpu() / len(asked.answer)


@dataclass(frozen=True)
class _Asked:
    """The tokens of an answer, and how to run the model where each is predicted."""

    answer: Tensor
    """(k,) token ids."""
    activations: Tensor
    """(k, layers, d_ff) what goes into each block's last MLP matrix where each is predicted."""
    columns: Tensor
    """(k,) where that is, in the tokens that `run` runs."""
    width: int
    """How many tokens a run reads, cached ones included."""
    run: Callable[[Tensor], Tensor]
    """From the numbers (m,) of answer tokens to the logits (m, vocab) that predict them."""


def _asked(lm: LanguageModel, prompt: str, answer: str) -> _Asked:
    if lm.kind == "decoder":
        return _continuing(lm, prompt, answer)
    if lm.task == "fill-mask":
        return _filling(lm, prompt, answer)
    raise ConfigError(
        "neurons are credited with an answer where one position predicts it: in a decoder or a "
        f"masked encoder; {lm.name} is neither."
    )


def _continuing(lm: LanguageModel, prompt: str, answer: str) -> _Asked:
    [text] = encode_answers(lm, [prompt], [answer])
    rows = [text.ids[:end] for end in range(text.prompt_length, len(text.ids))]
    last = torch.tensor([len(row) - 1 for row in rows])
    with captured(_last_matrices(lm)) as seen:
        paused = pause(lm, rows, last.tolist(), -1)

    def run(tokens: Tensor) -> Tensor:
        every = torch.arange(len(tokens))
        states = paused.states[tokens.to(paused.states.device)]
        return paused.resume(states, every, torch.zeros_like(every), tokens)

    activations = _at(lm, seen, last)
    return _Asked(
        torch.tensor(text.answer), activations, torch.zeros_like(last), len(rows[-1]), run
    )


def _filling(lm: LanguageModel, prompt: str, answer: str) -> _Asked:
    [text] = encode_masked(lm, [prompt], [answer])
    places = text.first + torch.arange(len(text.answer))
    batch = pad(lm, [text.ids])

    def run(tokens: Tensor) -> Tensor:
        n = len(tokens)
        some = Batch(batch.ids.expand(n, -1), batch.mask.expand(n, -1))
        return logits_at(lm, some, torch.arange(n), places[tokens])

    with captured(_last_matrices(lm)) as seen, torch.no_grad():
        run(torch.arange(len(places)))
    return _Asked(torch.tensor(text.answer), _at(lm, seen, places), places, len(text.ids), run)


def _last_matrices(lm: LanguageModel) -> dict[int, nn.Module]:
    return {layer: lm.mlp_out(layer) for layer in range(lm.layers)}


def _at(lm: LanguageModel, seen: Captured, places: Tensor) -> Tensor:
    """(k, layers, d_ff) what was seen at each row's place, in float32 or wider."""
    dtype, rows = torch.promote_types(lm.dtype, torch.float32), torch.arange(len(places))
    found = [seen.inputs[layer][rows, places] for layer in range(lm.layers)]
    return torch.stack([one.to(lm.device, dtype) for one in found], dim=1)


def _placed(points: Tensor, rows: Tensor, columns: Tensor) -> Callable[[Tensor], Tensor]:
    """Activations (m, t, d_ff) with `points[rows]` at (rows, columns)."""

    def rewrite(states: Tensor) -> Tensor:
        device = states.device
        where = (rows.to(device), columns.to(device))
        return states.index_put(where, points[rows.to(points.device)].to(states))

    return rewrite
