"""SERAC: edits are kept as texts, and a second model reads them (Mitchell et al. 2022).

"Memory-Based Model Editing at Scale", arXiv:2206.06520. What is learnt, once for a model: in what
space prompts are near that ask the same (the scope), and a smaller model, the counterfactual model,
that answers a prompt by the text of an edit before it. The loss of a step is

    c_edit * NLL(answer | the edit's text, a prompt in its scope)
      + c_scope * [ mean over prompts inside  of -log exp(-|x - z|^2)
                  + mean over prompts outside of -log(1 - exp(-|x - z'|^2)) ]

with z the place of a prompt's own edit and z' that of the nearest edit it does not belong to, among
all edits of the step. Making an edit is then looking up where its prompt is: nothing is trained.
How rows are routed is the memory's own rule (`errata.edits.memories.counterfactual`).

Where no smaller model is named, it begins as the model's own first blocks; where no encoder is
named, prompts are known by the model's own states.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from errata.editors.config import EditorConfig
from errata.editors.trainable import Fit, Fitted, Trainable, TrainingCases
from errata.editors.training import Learner, TrainingConfig, train
from errata.editors.wordings import drawn, wordings
from errata.edits.archive import Contents
from errata.edits.edit import Record
from errata.edits.memories.counterfactual import (
    Parts,
    Route,
    answer_instead,
    edit_text,
)
from errata.edits.memories.shared import Shared
from errata.edits.memory import MemoryEdit, set_aside
from errata.errors import ConfigError, FitError
from errata.lm.forward import frozen
from errata.lm.hooks import captured, stopped_after
from errata.lm.load import LanguageModel
from errata.lm.loss import Answers, Example, answer_logits
from errata.lm.prompts import asked
from errata.lm.sentences import SentenceEncoder
from errata.lm.smaller import described, first_blocks, same_vocabulary
from errata.lm.tokens import batches, encode, masked_prompt, pad
from errata.progress import Progress, silent
from errata.requests import Case, Request, check_batch, unique

KIND = "counterfactual"
_BATCH_TOKENS = 4096
"""Tokens, padding included, that are run at once."""
_NEAREST = 1e-4
"""No squared distance counts as smaller where the loss takes a logarithm of it."""


@dataclass(frozen=True)
class SeracConfig(EditorConfig):
    """SERAC's numbers; the papers' own where nothing else is said."""

    layers: tuple[int, ...] = ()
    """The one block whose states tell prompts apart. Empty: three quarters up the blocks that
    read."""
    counterfactual: str = ""
    """A folder or Hub name of a smaller model with the same vocabulary; empty for the model's own
    first blocks."""
    blocks: int = 0
    """How many of these; 0 for a quarter of them, at least 2."""
    encoder: str = ""
    """A folder or Hub name of a sentence encoder that tells prompts apart, as it is; empty for the
    model's own states."""
    width: int = 64
    """Of the space in which prompts are compared."""
    threshold: float = 0.5
    """How alike a prompt and an edit's must be."""
    edit: float = 0.1
    """c_edit, of the counterfactual model's answers."""
    scope: float = 1.0
    """c_scope, of telling prompts apart."""
    wordings: int = 1
    """How many of a case's request and paraphrases are asked in a step."""
    outside: int = 2
    """How many of its neighbours and of its subject's other facts."""
    learning_rate: float = 1e-3
    """Of the counterfactual model (the authors' code, for large ones: 1e-5)."""
    scope_learning_rate: float = 3e-3
    """Of the space."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(batch=32, at_once=32, clip=1.0)
    )

    def __post_init__(self) -> None:
        """Refuse numbers without sense."""
        super().__post_init__()
        self._at_least_one("width", "wordings", "outside")
        self._not_negative("edit", "scope", "learning_rate", "scope_learning_rate", "blocks")
        self._require(
            0 < self.threshold < 1, f"threshold must be between 0 and 1, got {self.threshold}."
        )


class FittedSerac(Fitted):
    """SERAC, fitted."""

    name = "serac"
    config: SeracConfig

    def __init__(self, config: SeracConfig, fit: Fit, parts: Parts) -> None:
        """Keep what was learnt.

        Args:
            config: the numbers, with the block that reads.
            fit: how it was fitted.
            parts: the space and the counterfactual model.
        """
        super().__init__(config, fit)
        self.parts = parts.eval().requires_grad_(False)
        self._encoder = SentenceEncoder.load(config.encoder) if config.encoder else None
        self._shared: Shared | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Space and counterfactual model; weights that are tied, once."""
        return {
            name: p.detach().cpu().contiguous().clone() for name, p in self.parts.named_parameters()
        }

    def edit(
        self, lm: LanguageModel, requests: Sequence[Request], *, progress: Progress = silent
    ) -> MemoryEdit:
        """Look up where each prompt is; nothing is trained.

        Raises:
            WrongModelError: it was fitted to another model.
            RequestError: there is no request, or two contradict each other.
        """
        requests = unique(requests)
        check_batch(requests)
        self.check(lm)
        if self._shared is None:
            self._shared = Shared.of(self.contents())
        (layer,) = self.config.layers
        path = lm.mlp_in_path(layer)
        progress("prompts", 0, 1)
        with set_aside(lm, KIND, path), torch.no_grad():
            known = prompt_features(lm, path, self._encoder, [request.text for request in requests])
            places = self.parts.to(lm.device).embedded(known.to(lm.device))
        progress("prompts", 1, 1)
        return MemoryEdit.of(
            lm,
            KIND,
            path,
            {"embeddings": places.cpu()},
            requests=requests,
            settings={"encoder": self.config.encoder, "threshold": self.config.threshold},
            shared=self._shared,
            record=Record.of(
                lm,
                method=self.name,
                config=self.config,
                seed=self.config.seed,
                notes={"left out": [], "shared": self._shared.file},
            ),
        )


class Serac(Trainable):
    """SERAC, to be fitted."""

    name = "serac"
    config: SeracConfig

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The block that reads: the one that is named, or three quarters up.

        Raises:
            ConfigError: there are several, or it is beyond the model's depth.
        """
        if len(self.config.layers) > 1:
            raise ConfigError(f"prompts are read at one block, not at {self.config.layers}.")
        if self.config.layers:
            return super().layers(lm)
        return (round(0.75 * (len(lm.reading) - 1)),)

    def fit(
        self,
        lm: LanguageModel,
        cases: TrainingCases,
        *,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> FittedSerac:
        """Train the space and the counterfactual model (see `Trainable.fit`)."""
        if not any(outside(case) for case in cases.train):
            raise FitError(
                "no case to learn from has neighbours or other facts of its subject, so nothing "
                "tells what is outside an edit's scope. Give cases that have some, such as "
                "CounterFact's."
            )
        layers = self.layers(lm)
        config = replace(self.config, layers=layers)
        path = lm.mlp_in_path(layers[0])
        lm.check_finite()
        encoder = SentenceEncoder.load(config.encoder) if config.encoder else None
        parts = begin(lm, path, config, encoder)
        fit = Fit.of(lm, [path])
        learner = SeracLearner(lm, path, parts, encoder, config)
        trained = train(
            learner,
            cases,
            config.training,
            seed=config.seed,
            folder=folder,
            identity={
                "base": fit.base,
                "config": {k: v for k, v in config.to_dict().items() if k != "training"},
            },
            progress=progress,
        )
        told = {
            "cases": {"train": len(cases.train), "validation": len(cases.validation)},
            "training": trained,
            "counterfactual": described(type(parts.network), parts.network.config),
        }
        return FittedSerac(config, fit.with_notes(told), parts)

    def restored(self, fit: Fit, tensors: Mapping[str, Tensor]) -> FittedSerac:
        """The editor that a file holds."""
        held = Contents("", {"fit": {"notes": fit.notes}}, tensors)
        return FittedSerac(self.config, fit, Parts.of(held))


def begin(
    lm: LanguageModel, path: str, config: SeracConfig, encoder: SentenceEncoder | None
) -> Parts:
    """The parts before anything is learnt: a projection that keeps distances, and a smaller model.

    Raises:
        ConfigError: the named model is no smaller one of the same kind and vocabulary.
        ModelLoadError: there is no such model.
    """
    if config.counterfactual:
        other = LanguageModel.load(config.counterfactual, dtype=torch.float32)
        same_vocabulary(lm, other)
        network = other.network
    else:
        network = first_blocks(lm, config.blocks or max(2, len(lm.reading) // 4))
    with torch.no_grad():
        known = prompt_features(lm, path, encoder, ["A"])
    parts = Parts(known.shape[1], config.width, network)
    generator = torch.Generator().manual_seed(config.seed)
    d = known.shape[1]
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[: config.width]
    with torch.no_grad():  # two prompts at an angle whose cosine is 0.65 are half in scope
        parts.scope.weight.copy_(basis * (d / len(basis)) ** 0.5)
    return parts.to(lm.device).requires_grad_(True)


class SeracLearner(Learner):
    """Both parts as the outer loop trains them."""

    def __init__(
        self,
        lm: LanguageModel,
        path: str,
        parts: Parts,
        encoder: SentenceEncoder | None,
        config: SeracConfig,
    ) -> None:
        """Train `parts` beside `lm`, which stays as it is.

        Args:
            lm: the model.
            path: the module whose inputs tell prompts apart.
            parts: what is trained.
            encoder: tells them apart instead, if there is one.
            config: the numbers.
        """
        super().__init__()
        self.lm, self.path, self.parts, self.encoder = lm, path, parts, encoder
        self.config = config
        self.second = LanguageModel.of(parts.network, lm.tokenizer, name="the counterfactual model")
        # It is to end after its answer, as answers of encoder-decoders do, lest it babble on.
        self.end = (lm.tokenizer.eos_token or "") if lm.kind == "decoder" else ""

    def loss(self, cases: Sequence[Case], draw: random.Random) -> Mapping[str, Tensor]:
        """The loss of some cases, all of whose edits are in memory.

        Returns:
            `loss`; `edit`, the mean NLL; `scope`, the two means; `accuracy`, the share of answers
            that come whole from the right edit's text; `inside` and `outside`, the share of
            prompts that are routed as they should be.
        """
        config = self.config
        self.parts.network.eval()  # nothing is dropped: each step is a function of seed and step
        asked_in: list[Example] = []
        owner: list[int] = []
        asked_out: list[str] = []
        beside: list[int] = []
        for number, case in enumerate(cases):
            some = drawn(wordings(case), config.wordings, draw)
            asked_in += [replace(one, answer=one.answer + self.end) for one in some]
            owner += [number] * len(some)
            other = outside(case)
            other = draw.sample(other, min(config.outside, len(other)))
            asked_out += other
            beside += [number] * len(other)
        texts = [*(case.request.text for case in cases), *(e.prompt for e in asked_in), *asked_out]
        with torch.no_grad():
            known = prompt_features(self.lm, self.path, self.encoder, texts)
        edits, inside, apart = torch.split(
            self.parts.embedded(known.to(self.lm.device)),
            [len(cases), len(asked_in), len(asked_out)],
        )
        near = (inside - edits[owner]).square().sum(dim=1)
        strange = torch.cat(
            [
                strangers(cases, [e.prompt for e in asked_in], owner, inside=True),
                strangers(cases, asked_out, beside, inside=False),
            ]
        ).to(edits.device)
        every = (torch.cat([inside, apart])[:, None] - edits).square().sum(dim=2)
        far = every.masked_fill(~strange, torch.inf).amin(dim=1)[strange.any(dim=1)]
        scope = near.mean()
        if len(far):
            scope = scope - torch.log(-torch.expm1(-far.clamp(min=_NEAREST))).mean()
        answers = self._answers(cases, asked_in, owner)
        edit = answers.losses().mean()
        limit = -math.log(config.threshold)
        return {
            "loss": config.edit * edit + config.scope * scope,
            "edit": edit,
            "scope": scope,
            "accuracy": answers.right().float().mean(),
            "inside": (near < limit).float().mean(),
            "outside": (far >= limit).float().mean() if len(far) else near.new_ones(()),
        }

    def rates(self) -> Mapping[str, float]:
        """Adam's learning rate for each parameter."""
        return {
            name: self.config.scope_learning_rate
            if name.startswith("parts.scope")
            else self.config.learning_rate
            for name, _ in self.named_parameters()
        }

    def _answers(self, cases: Sequence[Case], some: Sequence[Example], owner: list[int]) -> Answers:
        """What the counterfactual model answers, told the right edits."""
        told = encode(self.lm, [edit_text(self.lm, case.request) for case in cases])
        route = Route(list(range(len(some))), [told[number] for number in owner])
        handles = answer_instead(self.lm, self.second, lambda: route)
        try:
            with frozen(self.lm):
                return answer_logits(self.lm, some)
        finally:
            for handle in handles:
                handle.remove()


def outside(case: Case) -> list[str]:
    """Prompts that a case's edit is not for: its neighbours, and other facts of its subject."""
    return [probe.prompt for probe in (*case.neighbours, *case.same_subject)]


def strangers(
    cases: Sequence[Case], prompts: Sequence[str], owner: Sequence[int], *, inside: bool
) -> Tensor:
    """(n, cases) which edits each prompt does not belong to, as far as the cases tell.

    Args:
        cases: the edits.
        prompts: what is asked.
        owner: the case of each.
        inside: whether the prompts belong to their cases' edits, or are outside these.
    """
    apart = torch.ones(len(prompts), len(cases), dtype=torch.bool)
    for i, (prompt, mine) in enumerate(zip(prompts, owner, strict=True)):
        for j, case in enumerate(cases):
            if j == mine:
                apart[i, j] = not inside
            elif inside:  # another fact of the same subject is a stranger, the same fact is none
                same = bool(case.relation) and case.fact == cases[mine].fact
                apart[i, j] = not same and case.request.text != cases[mine].request.text
            else:
                apart[i, j] = case.request.subject not in prompt
    return apart


@torch.no_grad()
def prompt_features(
    lm: LanguageModel, path: str, encoder: SentenceEncoder | None, texts: Sequence[str]
) -> Tensor:
    """(n, d) what prompts are known by (see `features`)."""
    if encoder is not None:
        return encoder(texts)
    if lm.task == "fill-mask":
        texts = [masked_prompt(lm, text) for text in texts]
    rows, module = encode(lm, [text.rstrip(" ") for text in texts]), lm.module(path)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in batches([len(row) for row in rows], _BATCH_TOKENS):
        ends = torch.tensor([len(rows[i]) - 1 for i in group])
        batch = pad(lm, [rows[i] for i in group])
        with asked(lm, ends), captured({0: module}) as seen, stopped_after(module):
            lm.network(input_ids=batch.ids, attention_mask=batch.mask)
        states = seen.inputs[0]
        last = states[torch.arange(len(group)), ends.to(states.device)]
        for i, one in zip(group, last, strict=True):
            found[i] = one
    return torch.stack(found)
