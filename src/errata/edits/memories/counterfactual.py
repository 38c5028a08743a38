"""A memory of texts that a second model reads: SERAC's (Mitchell et al. 2022, arXiv:2206.06520).

An entry is an edit's text, "<prompt> <target>", and the place z of its prompt in a learnt space. Of
a row's prompt, at x in that space, the nearest entry's scope holds it if

    exp(-|x - z|^2) > threshold .

Then the counterfactual model, a smaller one, answers in the place of the model: it reads the edit's
text and after it the row. All other rows are answered by the model, bit for bit. A row is decided
upon once, at its prompt's last token; what follows is answered by whoever answered there.

Both the space and the second model are learnt (`editors/memory/serac.py`) and shared by all edits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from errata.edits.archive import Contents
from errata.edits.memories.memory import Entry, Memory, Place, shapes_misfit
from errata.errors import TokenizationError
from errata.lm.forward import logits_at
from errata.lm.hooks import attach, gathered_at
from errata.lm.load import LanguageModel
from errata.lm.prompts import current
from errata.lm.sentences import SentenceEncoder
from errata.lm.smaller import rebuilt
from errata.lm.tokens import encode, mask_token, masked_prompt, pad
from errata.requests import Request


class Parts(nn.Module):
    """What is learnt: the space, and the counterfactual model's weights."""

    def __init__(self, features: int, width: int, network: PreTrainedModel) -> None:
        """A space at random, from torch's global state, and a network as it is.

        Args:
            features: width of what a prompt is known by.
            width: of the space.
            network: the counterfactual model.
        """
        super().__init__()
        self.scope = nn.Linear(features, width, bias=False)
        self.network = network

    @classmethod
    def of(cls, contents: Contents) -> Self:
        """Those that a fitted editor's file holds."""
        tensors, notes = contents.tensors, contents.fields["fit"]["notes"]
        width, features = tensors["scope.weight"].shape
        parts = cls(features, width, rebuilt(notes["counterfactual"]))
        own = dict(parts.named_parameters())
        if own.keys() != tensors.keys():
            raise KeyError(f"{sorted(own.keys() ^ tensors.keys())[:3]} are there once only")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        return parts.eval().requires_grad_(False)

    def embedded(self, features: Tensor) -> Tensor:
        """(n, width) places of prompts known by features (n, d), whose length does not matter."""
        places: Tensor = self.scope(normalize(features.float(), dim=1))
        return places


@dataclass(frozen=True)
class Route:
    """Which rows of a pass the counterfactual model answers, and what it reads before each."""

    rows: list[int]
    told: list[list[int]]
    """Token ids of the edits' texts."""


def edit_text(lm: LanguageModel, request: Request) -> str:
    """What the counterfactual model is told of an edit: its prompt and what comes after it."""
    if lm.task == "fill-mask":
        return masked_prompt(lm, request.text).replace(mask_token(lm), request.target.strip())
    return f"{request.text.rstrip(' ')} {request.target.strip()}"


def answer_instead(
    lm: LanguageModel, second: LanguageModel, route: Callable[[], Route | None]
) -> list[RemovableHandle]:
    """From now on `second` answers the rows that `route` names, until the handles are removed.

    Only what is predicted from a prompt's last token on is replaced; gradients reach `second`.

    Args:
        lm: the model; its passes tell where prompts end (`errata.lm.prompts`).
        second: the counterfactual model.
        route: the decision for the pass that has just been made; None for no row.
    """

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the rows that are read, which a later pass may only go on from."""
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        prompts = current(lm)
        if prompts.start and lm.kind == "decoder":
            for row, more in zip(prompts.kept[lm], ids.tolist(), strict=True):
                row.extend(more)
            return
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        prompts.kept[lm] = [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]

    def answer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        decided, prompts = route(), current(lm)
        written: Tensor | None = kwargs.get("decoder_input_ids")
        if written is not None:
            before: Tensor | None = prompts.kept.get("written") if prompts.start else None
            written = written if before is None else torch.cat([before, written], dim=1)
            prompts.kept["written"] = written
        if decided is not None and decided.rows:
            rows, columns = _places(lm, output.logits)
            # Where this pass began among the columns of the row, or of the answer being written.
            columns = columns + prompts.start * (lm.task == "generate")
            output.logits = _answered(
                lm, second, decided, output.logits, rows, columns, prompts.kept[lm], written
            )
        return output

    reader: Any = lm.network.get_encoder() if lm.kind == "encoder-decoder" else lm.network
    return [
        reader.register_forward_pre_hook(read, with_kwargs=True),
        lm.network.register_forward_hook(answer, with_kwargs=True),
    ]


def _places(lm: LanguageModel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The row and column of each prediction, in the order of logits laid flat but for the last."""
    if lm.task == "classify":
        return torch.arange(len(logits)), torch.zeros(len(logits), dtype=torch.long)
    gathered = gathered_at(lm.head)
    if gathered is not None:
        return gathered[0].cpu(), gathered[1].cpu()
    rows, columns = logits.shape[:2]
    return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)


def _answered(
    lm: LanguageModel,
    second: LanguageModel,
    route: Route,
    logits: Tensor,
    rows: Tensor,
    columns: Tensor,
    read: Sequence[list[int]],
    written: Tensor | None,
) -> Tensor:
    """Logits of which those of the routed rows are the counterfactual model's."""
    number = torch.full((len(read),), -1)
    number[route.rows] = torch.arange(len(route.rows))
    mine = number[rows] >= 0
    if lm.kind == "decoder":
        mine &= columns >= current(lm).ends[rows]
    if not mine.any():
        return logits
    texts = [told + read[row] for told, row in zip(route.told, route.rows, strict=True)]
    if (longest := max(map(len, texts))) > second.max_length:
        raise TokenizationError(
            f"an edit and the text that it answers have {longest} tokens together, and the "
            f"counterfactual model reads {second.max_length}. Shorten the text."
        )
    own, at = number[rows[mine]], columns[mine]
    batch = pad(second, texts)
    if lm.task == "classify":
        said = second.network(input_ids=batch.ids, attention_mask=batch.mask).logits[own]
    elif written is not None:
        said = second.network(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            decoder_input_ids=written[route.rows].to(second.device),
            use_cache=False,
        ).logits[own, at]
    else:
        shift = torch.tensor([len(told) for told in route.told])
        said = logits_at(second, batch, own, at + shift[own])
    flat = logits.reshape(-1, logits.shape[-1])
    where = mine.nonzero()[:, 0].to(flat.device)
    return flat.index_put((where,), said.to(flat)).reshape(logits.shape)


class CounterfactualMemory(Memory):
    """Entries are `embeddings` (n, width); texts are those of the requests.

    Settings: `encoder`, the sentence encoder's name or "" for the model's own states, and
    `threshold`.
    """

    def __init__(self, place: Place) -> None:
        """No entry."""
        super().__init__(place)
        assert place.shared is not None
        self.parts: Parts = place.shared.once(Parts.of).to(place.lm.device)
        name = place.settings["encoder"]
        self.encoder = SentenceEncoder.load(name) if name else None
        self.second = LanguageModel.of(
            self.parts.network, place.lm.tokenizer, name="the counterfactual model"
        )
        self.embeddings = self.parts.scope.weight.new_zeros(0, len(self.parts.scope.weight))
        self.told: list[list[int]] = []

    @classmethod
    def misfit(cls, place: Place, tensors: Mapping[str, Tensor]) -> str:
        """Why embeddings or settings do not fit; empty if they do."""
        if place.settings.keys() != {"encoder", "threshold", "shared"} or place.shared is None:
            return f"this memory cannot be set like {dict(place.settings)}"
        width, features = place.shared.once(Parts.of).scope.weight.shape
        if not place.settings["encoder"] and features != place.sizes[1]:
            return f"states are {place.sizes[1]} wide, not {features}"
        return shapes_misfit(tensors, {"embeddings": (width,)})

    def extended(self, entries: Sequence[Entry]) -> Self:
        """These entries after those that are there."""
        more = type(self).__new__(type(self))
        more.__dict__.update(self.__dict__)
        new = torch.stack([entry.tensors["embeddings"] for entry in entries])
        more.embeddings = torch.cat([self.embeddings, new.to(self.embeddings)])
        lm = self.place.lm
        texts = [edit_text(lm, entry.requests[0]) for entry in entries]
        more.told = [*self.told, *encode(lm, texts)]
        return more

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity (n,) of prompts at (n, width) to the nearest entry, and which it is."""
        distance, number = torch.cdist(queries, self.embeddings).min(dim=1)
        return (-distance.square()).exp(), number

    def rewritten(self, states: Tensor, output: Tensor) -> Tensor:
        """Decide on each row of the pass; the output itself stays as it is."""
        prompts = self.place.prompts
        if prompts.start:
            return output
        ends = prompts.ends
        last = states[torch.arange(len(states)), ends.to(states.device)].detach()
        read = [
            row[: int(end) + 1] for row, end in zip(prompts.kept[self.place.lm], ends, strict=True)
        ]
        known = last
        if self.encoder is not None:
            tokenizer = self.place.lm.tokenizer
            known = self.encoder([str(tokenizer.decode(r, skip_special_tokens=True)) for r in read])
        with torch.no_grad():
            likeness, number = self.nearest(self.parts.embedded(known.to(self.embeddings)))
        rows = (likeness > self.place.settings["threshold"]).nonzero()[:, 0].tolist()
        prompts.kept[self.place] = Route(rows, [self.told[int(number[row])] for row in rows])
        return output

    @classmethod
    def attach(cls, place: Place, now: Callable[[], Self | None]) -> list[RemovableHandle]:
        """Watch what the reading block sees, and what the model says in the end."""

        def look(states: Tensor, output: Tensor) -> Tensor:
            memory = now()
            return output if memory is None else memory.rewritten(states, output)

        def route() -> Route | None:
            decided: Route | None = place.prompts.kept.get(place)
            return decided

        assert place.shared is not None
        second = LanguageModel.of(
            place.shared.once(Parts.of).network, place.lm.tokenizer, name="the counterfactual model"
        )
        return [*attach(place.module, look), *answer_instead(place.lm, second, route)]
