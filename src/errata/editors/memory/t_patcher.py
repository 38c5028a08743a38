"""T-Patcher: one mistake, one neuron (Huang et al. 2023, arXiv:2301.09785).

Each token of the answer that the model would not say after the true ones before it gets a neuron of
its own beside the last MLP, trained to fire on that token's hidden state, to be silent on those of
ordinary text, and to add what makes the answer right (`patches.py`). Weights and earlier neurons
stay as they are: an edit holds its own neurons and no others.

Neurons of the last MLP change nothing that any MLP sees, so hidden states are those of the model
without them. Training computes what comes after that MLP, and all that stands before it once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from errata.algebra.neurons import Neurons
from errata.editors.background import Background
from errata.editors.config import EditorConfig
from errata.editors.editor import Editor
from errata.editors.memory.patches import PatchConfig, Patched, first_neurons, train_neurons
from errata.edits.edit import Record
from errata.edits.memory import MemoryEdit, set_aside
from errata.errors import ConfigError, NotFiniteError
from errata.lm.forward import Replay, frozen
from errata.lm.hooks import captured, rewritten_output, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.loss import Answers, Example, answer_logits
from errata.lm.tokens import pad
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent
from errata.requests import Request, check_batch, unique

KIND = "neurons"
_TEXT_TOKENS = 128
"""As much is read of each ordinary text."""
_TEXTS = 32
"""So many at once."""


@dataclass(frozen=True)
class TPatcherConfig(EditorConfig):
    """T-Patcher's numbers; the authors' own where nothing else is said."""

    layers: tuple[int, ...] = ()
    """The one block beside whose MLP neurons are put. Empty: the last."""
    neurons: int = 5
    """At most so many for one request; of an answer with more wrong tokens, the first ones."""
    memory_tokens: int = 10_000
    """On how many tokens of ordinary text neurons learn to be silent; 0: on none (the authors'
    code: 40,000)."""
    patch: PatchConfig = field(default_factory=PatchConfig)

    def __post_init__(self) -> None:
        """Refuse numbers without sense."""
        super().__post_init__()
        self._at_least_one("neurons")
        self._not_negative("memory_tokens")


class TPatcher(Editor):
    """A neuron for each wrong token, beside the last MLP."""

    name = "t-patcher"
    depth = (1.0, 1.0)
    config: TPatcherConfig

    def __init__(self, config: TPatcherConfig, background: Background) -> None:
        """Keep the numbers and where ordinary text comes from."""
        super().__init__(config, background)
        self._old: WeakKeyDictionary[PreTrainedModel, Ordinary] = WeakKeyDictionary()

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The one block: the last, unless it is named.

        Raises:
            ConfigError: there are several, or it is beyond the model's depth.
        """
        if len(self.config.layers) > 1:
            raise ConfigError(f"neurons sit beside one block's MLP, not {self.config.layers}.")
        return super().layers(lm) if self.config.layers else (lm.layers - 1,)

    def prepare(self, lm: LanguageModel, *, progress: Progress = silent) -> None:
        """Look at the hidden states of ordinary text, once.

        Raises:
            ConfigError: there is no such block, or no ordinary text.
            NotFiniteError: the model gives NaN or infinity.
        """
        (layer,) = self.layers(lm)
        if lm.network not in self._old:
            progress("ordinary text", 0, 1)
            self._old[lm.network] = Ordinary.of(
                lm, layer, self.background, self.config.memory_tokens
            )
            progress("ordinary text", 1, 1)

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> MemoryEdit:
        """Train the neurons of each request in turn, those before it in place.

        A request whose answer the model says already gets none. The notes tell, for each, whether
        all of its answer comes.

        Raises:
            ConfigError: there is no such block, or no ordinary text.
            RequestError: there is no request, or two contradict each other.
            NotFiniteError: the model, or the training, gives NaN or infinity.
            TokenizationError: a prompt or target has no token of its own, or is too long.
        """
        requests = unique(requests)
        check_batch(requests)
        self.prepare(lm, progress=progress)
        (layer,) = self.layers(lm)
        path = lm.mlp_out_path(layer)
        done: list[Patched] = []
        with frozen(lm), set_aside(lm, KIND, path, [request.text for request in requests]):
            for number, request in enumerate(requests):
                progress("neurons", number, len(requests))
                done.append(self._patched(lm, layer, request, [one.neurons for one in done]))
        progress("neurons", len(requests), len(requests))
        neurons = Neurons.joined([one.neurons for one in done]).to(
            device="cpu", dtype=torch.float32
        )
        return MemoryEdit.of(
            lm,
            KIND,
            path,
            {"keys": neurons.keys, "biases": neurons.biases, "values": neurons.values},
            settings={"layer": layer},
            serves=[(number,) for number, one in enumerate(done) for _ in one.own],
            requests=requests,
            record=Record.of(
                lm,
                method=self.name,
                config=self.config.to_dict() | {"layers": (layer,)},
                seed=self.config.seed,
                notes={
                    "left out": [],
                    "neurons": [len(one.own) for one in done],
                    "right": [one.right for one in done],
                    "updates": [one.updates for one in done],
                    "loss": [one.edit for one in done],
                    "memory loss": [one.memory for one in done],
                },
            ),
        )

    def _patched(
        self, lm: LanguageModel, layer: int, request: Request, earlier: Sequence[Neurons]
    ) -> Patched:
        """The neurons of one request, trained; none if its answer is right already."""
        config = self.config.patch
        modules = {"in": lm.mlp_in(layer), "out": lm.mlp_out(layer)}
        # Where the stream takes what an MLP adds as it is, it may as well be added after the block.
        below, place = (layer + 1, lm.block) if lm.anatomy.additive else (layer, lm.mlp_out)
        module, act = place(layer), lm.activation
        example = Example(request.text, request.target)

        def asked() -> Answers:
            return answer_logits(lm, [example])

        with captured(modules, "both") as seen:
            replay = Replay.of(lm, below, asked)
        x, output = seen.inputs["in"], seen.outputs["out"]
        with replay.told():
            none = _no_neurons(x.shape[-1], output.shape[-1], x.device)
            before = Neurons.joined([none, *earlier])(x, act)

            def beside(neurons: Neurons) -> Answers:
                added = before + neurons(x, act)
                with rewritten_output(module, lambda out: out + added.to(out)):
                    return asked()

            def answer(neurons: Neurons) -> tuple[Tensor, bool]:
                told = beside(neurons)
                logits = told.logits.to(torch.promote_types(told.logits.dtype, torch.float32))
                loss = cross_entropy(logits, told.wanted, label_smoothing=config.smoothing)
                return loss, bool(told.right().all())

            with torch.no_grad():
                told = beside(none)
            if not told.logits.isfinite().all():
                lm.check_finite()
                raise NotFiniteError(
                    f"{lm.name} gives {request.target!r} after {request.text!r} a loss that is "
                    "not finite: its dtype overflows (try float32 or bfloat16)."
                )
            wrong = (told.logits.argmax(-1) != told.wanted).nonzero()[: self.config.neurons, 0]
            at = told.rows[wrong].to(x.device), told.columns[wrong].to(x.device)
            queries = x[at].float()
            if not len(queries):
                return Patched(none, 0, True, float(told.losses()), 0.0, [])
            rms = float(output[at].float().square().mean().sqrt())
            first = first_neurons(
                queries,
                output.shape[-1],
                amplify=config.amplify * (rms if config.units == "relative" else 1.0),
                seed=random.Random(f"{self.config.seed} {request.text}").getrandbits(63),
            )
            old = self._old[lm.network].apart_from(request.subject).to(x.device)
            return train_neurons(first, queries, old, answer, rms, config)


@dataclass(frozen=True, eq=False)
class Ordinary:
    """Hidden states of ordinary text, on which neurons are to be silent; made with `of`."""

    states: Tensor
    """(m, d_in) what goes into the MLP."""
    owner: Tensor
    """(m,) which text each is of."""
    texts: tuple[str, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LanguageModel, layer: int, background: Background, tokens: int) -> Self:
        """The states of about so many tokens.

        Raises:
            ConfigError: the model writes no text, and none is given.
            DatasetError: the text cannot be read.
            NotFiniteError: the model gives NaN or infinity.
        """
        if tokens and background.corpus is None and lm.kind != "decoder":
            raise ConfigError(
                f"{lm.name} is an {lm.kind} and cannot write ordinary text to be silent on. Give "
                "some (a corpus), or set memory_tokens = 0."
            )
        module = lm.mlp_in(layer)
        states = [torch.zeros(0, weight_out_in(module).shape[1], device=lm.device)]
        texts: list[str] = []
        owner: list[int] = []
        source = iter(background.text(lm, tokens)) if tokens else iter(())
        while len(owner) < tokens and (some := list(islice(source, _TEXTS))):
            for text, found in zip(some, _states(lm, module, some), strict=True):
                owner += [len(texts)] * len(found)
                states.append(found.to(states[0]))
                texts.append(text.casefold())
        joined = torch.cat(states)[:tokens]
        if not joined.isfinite().all():
            lm.check_finite()
            raise NotFiniteError(
                f"{lm.name} gives hidden states that are not finite: its dtype overflows (try "
                "float32 or bfloat16)."
            )
        return cls(joined, torch.tensor(owner[:tokens], dtype=torch.long), tuple(texts))

    def apart_from(self, subject: str) -> Tensor:
        """The states of texts without the subject: what they say of it may have to change."""
        name = subject.strip().casefold()
        apart = torch.tensor([name not in text for text in self.texts], dtype=torch.bool)
        return self.states[apart[self.owner].to(self.states.device)]


def _states(lm: LanguageModel, module: nn.Module, texts: Sequence[str]) -> list[Tensor]:
    """What goes into a module of the last stack, (tokens, d) for each text.

    A classifier answers at the first token alone. An encoder-decoder reads each text and writes it.
    """
    length = min(_TEXT_TOKENS, lm.max_length)
    rows = lm.tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    batch = pad(lm, [row or [lm.pad_id] for row in rows])
    written: dict[str, Tensor] = {}
    if lm.kind == "encoder-decoder":
        network: Any = lm.network
        written["decoder_input_ids"] = network.prepare_decoder_input_ids_from_labels(batch.ids)
    with captured({0: module}) as seen, stopped_after(module):
        lm.network(input_ids=batch.ids, attention_mask=batch.mask, **written)
    lengths = [1 if lm.task == "classify" else len(row) for row in rows]
    return [seen.inputs[0][i, :length] for i, length in enumerate(lengths)]


def _no_neurons(d_in: int, d_out: int, device: torch.device) -> Neurons:
    return Neurons(*(torch.zeros(0, *width, device=device) for width in ((d_in,), (), (d_out,))))
