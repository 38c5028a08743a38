"""The runs of causal tracing, and what restoring one place of the corrupted runs does.

Nothing is computed twice: one pass runs the clean row beside the corrupted ones and is recorded.
A restoration at a token and layer starts from there, computes only the tokens from that one on in
the layers above, and shares its batch with the other samples and with other tokens of the layer.
Tokens before the subject are the same in all runs: restoring them is known to do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from errata.lm.forward import Paused, Recorded, record
from errata.lm.hooks import captured, rewritten_output
from errata.lm.load import LanguageModel
from errata.lm.tokens import Encoded
from errata.locate.traces import Kind, Part
from errata.progress import Progress, silent

_PADDING = 20
"""Tokens of padding that cost a CPU less than another batch. Other devices take as many as memory
allows."""


@dataclass(frozen=True)
class Runs:
    """The clean run (row 0) and n corrupted ones of a prompt with its answer, in one pass."""

    lm: LanguageModel
    row: Encoded
    recorded: Recorded
    outputs: dict[tuple[Part, int], Tensor]
    """(1 + n, t, d_model) what each layer's MLP and attention returned."""
    clean: float
    """The answer's probability in the clean run."""
    corrupted: Tensor
    """(n,) in the corrupted ones."""
    batch_tokens: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, lm: LanguageModel, row: Encoded, noise: Tensor, *, replace: bool, batch_tokens: int
    ) -> Self:
        """Run them.

        Args:
            lm: the model, a decoder.
            row: a prompt with its answer.
            noise: (n, subject's tokens, embedding's width), for each corrupted run.
            replace: put noise in the place of embeddings rather than add it.
            batch_tokens: at most so many tokens are computed at once in restorations.
        """
        hidden = slice(row.subject_first, row.subject_last + 1)

        def corrupted(embedded: Tensor) -> Tensor:
            embedded = embedded.clone()
            if replace:
                embedded[1:, hidden] = noise.to(embedded)
            else:
                embedded[1:, hidden] += noise.to(embedded)
            return embedded

        every = range(lm.layers)
        parts: dict[tuple[Part, int], nn.Module] = {
            **{("mlp", layer): lm.mlp(layer) for layer in every},
            **{("attention", layer): lm.attention(layer) for layer in every},
        }
        rows = [row.ids[:-1]] * (1 + len(noise))  # the answer's last token is never read
        with rewritten_output(lm.embedding, corrupted), captured(parts, "output") as seen:
            recorded = record(lm, rows, range(-1, lm.layers))
        starts = [row.prompt_length - 1] * len(rows)
        paused = recorded.paused(starts, lm.layers - 1)
        found = _probabilities(paused, paused.states, row, starts)
        return cls(lm, row, recorded, seen.outputs, float(found[0]), found[1:], batch_tokens)

    def restored(
        self,
        kind: Kind,
        window: int = 1,
        severed: Part | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """The answer's probability with each token and layer restored: (tokens, layers, n).

        Args:
            kind: what is put back to its clean value.
            window: of how many layers; see `around`.
            severed: which part keeps its corrupted outputs at the token in the layers above.
            progress: told how many layers are done.
        """
        layers, last = self.lm.layers, self.row.prompt_length - 1
        grid = self.corrupted.repeat(last + 1, layers, 1)
        progress("tracing", 0, layers)
        for layer in range(layers):
            place = range(layer, layer + 1) if kind == "state" else around(layer, window, layers)
            # Other tokens see a change only in the blocks above it.
            reaching = range(self.row.subject_first, last + 1)
            if place.start == layers - 1:
                reaching = range(last, last + 1)
            for tokens in self._batches(reaching):
                if kind == "state":
                    grid[tokens, layer] = self._with_states(tokens, layer, severed)
                else:
                    grid[tokens, layer] = self._with_outputs(tokens, place, kind)
            progress("tracing", layer + 1, layers)
        return grid

    def _batches(self, tokens: range) -> Iterator[list[int]]:
        """Tokens that are restored together: of like distance to the end, within the memory."""
        length, n = len(self.row.ids) - 1, len(self.corrupted)
        allowed = _PADDING if self.lm.device.type == "cpu" else self.batch_tokens
        group: list[int] = []
        for token in reversed(tokens):
            full = n * (len(group) + 1) * length > self.batch_tokens
            if group and (full or n * sum(later - token for later in group) > allowed):
                yield group
                group = []
            group.append(token)
        yield group

    def _with_states(self, tokens: Sequence[int], layer: int, severed: Part | None) -> Tensor:
        """Restore the block's output at each of the tokens: (tokens, n)."""
        rows, starts = self._rows(tokens)
        held = {
            self._module(severed, k): self.outputs[severed, k][rows, starts]
            for k in range(layer + 1, self.lm.layers)
            if severed
        }
        paused = self.recorded.paused(starts, layer, rows)
        states = _beginning_with(self.recorded.states[layer][0, starts])(paused.states)
        return self._resumed(paused, states, starts, held)

    def _with_outputs(self, tokens: Sequence[int], place: range, part: Part) -> Tensor:
        """Restore what the MLPs or attentions of some layers return at each of the tokens."""
        rows, starts = self._rows(tokens)
        held = {self._module(part, k): self.outputs[part, k][0, starts] for k in place}
        paused = self.recorded.paused(starts, place.start - 1, rows)
        return self._resumed(paused, paused.states, starts, held)

    def _rows(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Every corrupted run for each token: rows, and at which token each begins."""
        n = len(self.corrupted)
        return list(range(1, n + 1)) * len(tokens), [t for t in tokens for _ in range(n)]

    def _module(self, part: Part, layer: int) -> nn.Module:
        return self.lm.mlp(layer) if part == "mlp" else self.lm.attention(layer)

    @torch.no_grad()
    def _resumed(
        self, paused: Paused, states: Tensor, starts: Sequence[int], held: dict[nn.Module, Tensor]
    ) -> Tensor:
        """Go on, some modules' outputs at the first token being given: (tokens, n)."""
        with ExitStack() as stack:
            for module, values in held.items():
                stack.enter_context(rewritten_output(module, _beginning_with(values)))
            found = _probabilities(paused, states, self.row, starts)
        return found.reshape(-1, len(self.corrupted))


def around(layer: int, window: int, layers: int) -> range:
    """The layers of a window around `layer`, cut off at the ends."""
    return range(max(0, layer - window // 2), min(layers, layer - (-window // 2)))


def _beginning_with(values: Tensor) -> Callable[[Tensor], Tensor]:
    """Puts `values` (m, width) in the place of each row's first token."""
    return lambda output: torch.cat([values[:, None].to(output), output[:, 1:]], dim=1)


def _probabilities(paused: Paused, states: Tensor, row: Encoded, starts: Sequence[int]) -> Tensor:
    """The answer's probability in each row, token after token: (m,) float64 on the CPU."""
    m, answer = len(starts), torch.tensor(row.answer)
    rows = torch.arange(m).repeat_interleave(len(answer))
    columns = row.prompt_length - 1 - torch.tensor(starts)[:, None] + torch.arange(len(answer))
    log_p = paused.resume(states, rows, columns.flatten()).float().log_softmax(dim=1)
    tokens = answer.repeat(m).to(log_p.device)
    return log_p.gather(1, tokens[:, None]).reshape(m, -1).cpu().double().sum(dim=1).exp()
