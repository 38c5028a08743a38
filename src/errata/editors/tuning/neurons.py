"""KN: a fact is changed in its own knowledge neurons (Dai et al. 2022, arXiv:2104.08696).

A neuron's value vector v, its column of the block's last MLP matrix, is what it adds to the stream
where it fires. The knowledge neurons of what the model says today (`errata.locate.neurons`) get

    v  <-  v - remove * |v| / |e_old| * e_old + add * |v| / |e_new| * e_new

with e the word embedding of the old and the new answer, the mean over its tokens. `mode = "erase"`
sets v to zero instead. `mode = "fixed"` adds and takes away the embeddings as they are, whatever
the length of v: with 2 and 2, the port to GPT by EleutherAI that ROME's authors compare with.

The result is exact in as many ranks as neurons. Neurons that several requests share get the sum of
their changes, each reckoned from v as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from errata.algebra.low_rank import LowRank
from errata.editors.background import Background
from errata.editors.config import EditorConfig
from errata.editors.contexts import Contexts
from errata.editors.editor import Editor
from errata.edits.edit import Record
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, TargetError
from errata.lm.load import LanguageModel
from errata.lm.loss import predictions
from errata.lm.tokens import encode_answers, encode_masked
from errata.lm.weights import weight_out_in
from errata.locate.neurons import Neuron, knowledge_neurons
from errata.progress import Progress, silent
from errata.requests import Request, check_batch, unique

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnowledgeNeuronsConfig(EditorConfig):
    """Numbers of the knowledge-neuron edit."""

    layers: tuple[int, ...] = ()
    """Blocks whose neurons may be changed, ascending. Empty: all."""
    seed: int = 0
    """Of the random contexts."""
    mode: Literal["rewrite", "fixed", "erase"] = "rewrite"
    """Move value vectors by a multiple of their own length, move them by a multiple of the
    embedding's, or set them to zero, which makes the model forget and says nothing new."""
    remove: float = 1.0
    """How much of the old answer's embedding is taken away."""
    add: float = 8.0
    """How much of the new answer's embedding is added."""
    embedding: Literal["input", "output"] = "input"
    """Which embedding an answer has: the word embedding (as in the paper, whose models have only
    one), or the matrix that makes logits."""
    steps: int = 20
    """Of the integrated gradients."""
    threshold: float = 0.2
    """A prompt's neurons have at least this share of its largest attribution."""
    share: float = 0.7
    """A fact's neurons are found in more than this share of its prompts, to begin with."""
    prefixes: tuple[tuple[int, int], ...] = ((5, 10),)
    """Random contexts before the prompt, which make several prompts of one: (how many, of how many
    tokens) each. Decoders only."""
    contexts: tuple[str, ...] = ()
    """Contexts given as text, instead of random ones; the bare prompt is always among them."""
    keep_going: bool = False
    """Leave out requests without neurons, instead of failing as a whole."""


class KnowledgeNeurons(Editor):
    """Rewrites or erases the value vectors of a fact's knowledge neurons."""

    name = "kn"
    depth = (0.0, 1.0)
    config: KnowledgeNeuronsConfig

    def __init__(self, config: KnowledgeNeuronsConfig, background: Background) -> None:
        """Keep the numbers; the background is not asked."""
        super().__init__(config, background)
        self._contexts = Contexts(config.contexts, config.prefixes, seed=config.seed)

    def prepare(self, lm: LanguageModel, *, progress: Progress = silent) -> None:
        """Look at the numbers and write the random contexts."""
        self.layers(lm)
        self._before(lm)

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> WeightEdit:
        """Change the neurons of all requests, found on the model as it is; it stays so.

        Args:
            lm: a decoder or a masked encoder.
            requests: what it is to say; `true` is what it says today, and asked of it if not given.
            progress: called with (stage, done, total).

        Raises:
            ConfigError: the model is of another kind, or a number does not fit it.
            RequestError: there is no request, or two contradict each other.
            TargetError: a request has no neurons (with `keep_going`: none has).
            NotFiniteError: an attribution is NaN or infinite.
            TokenizationError: a prompt or answer has no token of its own, or is too long.
        """
        requests = unique(requests)
        check_batch(requests)
        self.prepare(lm, progress=progress)
        moves: dict[int, dict[int, Tensor]] = {}
        told: dict[str, list[Neuron]] = {}
        failures: list[str] = []
        for done, request in enumerate(requests, 1):
            # What an encoder fills in, or a decoder's next token, may be no text by itself.
            old = request.true or predictions(lm, [request.text], new_tokens=1)[0]
            if not old:
                failures.append(f"{request.text!r}: the model says nothing readable; give `true`")
            elif neurons := self._neurons(lm, request, old):
                told[request.text] = neurons
                self._move(lm, request, old, neurons, moves)
            else:
                failures.append(f"{request.text!r}: no neuron of these blocks speaks for {old!r}")
            progress("requests", done, len(requests))
        if failures and not (told and self.config.keep_going):
            raise TargetError(
                f"{len(failures)} of {len(requests)} requests have no knowledge neurons:\n"
                + "\n".join(f"  {failure}" for failure in failures)
                + "\n  The model does not know what it should say today (see `true`); or leave "
                "such requests out with keep_going."
            )
        if failures:
            logger.warning("left out:\n%s", "\n".join(failures))
        notes = {"left out": failures, "contexts": self._before(lm), "neurons": told}
        config = self.config.to_dict() | {"layers": self.layers(lm)}
        changes = {
            lm.mlp_out_path(layer): _factors(gains, _values(lm, layer).shape[1])
            for layer, gains in sorted(moves.items())
        }
        return WeightEdit.of(
            lm,
            changes,
            requests=[request for request in requests if request.text in told],
            record=Record.of(
                lm, method=self.name, config=config, seed=self.config.seed, notes=notes
            ),
        )

    def _before(self, lm: LanguageModel) -> list[str]:
        """What stands before prompts; only decoders write prefixes of their own."""
        if lm.kind != "decoder":
            return ["", *(text for text in self.config.contexts if text)]
        return self._contexts.of(lm)

    def _neurons(self, lm: LanguageModel, request: Request, old: str) -> list[Neuron]:
        """The knowledge neurons of what the model says today, in the blocks to edit."""
        found = knowledge_neurons(
            lm,
            [context + request.text for context in self._before(lm)],
            old,
            steps=self.config.steps,
            threshold=self.config.threshold,
            share=self.config.share,
        )
        layers = set(self.layers(lm))
        return [neuron for neuron in found if neuron.layer in layers]

    def _move(
        self,
        lm: LanguageModel,
        request: Request,
        old: str,
        neurons: Sequence[Neuron],
        moves: dict[int, dict[int, Tensor]],
    ) -> None:
        """Add to `moves`, layer by layer and neuron by neuron, what each value vector gains."""
        relative = self.config.mode == "rewrite"
        if self.config.mode != "erase":
            gain = self.config.add * self._embedded(lm, request.text, request.target, relative)
            gain -= self.config.remove * self._embedded(lm, request.text, old, relative)
        for neuron in neurons:
            value = _values(lm, neuron.layer)[:, neuron.index]
            mine = moves.setdefault(neuron.layer, {})
            if self.config.mode == "erase":
                mine[neuron.index] = -value
            else:
                so_far = mine.get(neuron.index, torch.zeros_like(value))
                mine[neuron.index] = so_far + gain.to(value) * (value.norm() if relative else 1.0)

    def _embedded(self, lm: LanguageModel, prompt: str, answer: str, unit: bool) -> Tensor:
        """(d_model,) the mean embedding of the answer's tokens, of length 1 if so wanted.

        Raises:
            ConfigError: embeddings are of another width than the stream.
        """
        encoded = encode_answers if lm.kind == "decoder" else encode_masked
        tokens = encoded(lm, [prompt], [answer])[0].answer
        table = (lm.embedding if self.config.embedding == "input" else lm.head).weight
        assert isinstance(table, Tensor)
        if table.shape[1] != lm.d_model:
            raise ConfigError(
                f"the embeddings of {lm.name} are {table.shape[1]} wide and its value vectors "
                f"{lm.d_model}: one cannot be added to the other. Only mode = 'erase' works."
            )
        mean = table.detach()[tokens].float().mean(dim=0)
        return normalize(mean, dim=0) if unit else mean


def _values(lm: LanguageModel, layer: int) -> Tensor:
    """(d_model, d_ff) a block's value vectors, one for each neuron."""
    return weight_out_in(lm.mlp_out(layer)).float()


def _factors(gains: Mapping[int, Tensor], width: int) -> LowRank:
    """The change of some of the `width` value vectors of a block: one rank for each."""
    indices = sorted(gains)
    left = torch.stack([gains[index] for index in indices], dim=1)
    right = torch.zeros(len(indices), width, device=left.device)
    right[range(len(indices)), indices] = 1.0
    return LowRank(left, right)
