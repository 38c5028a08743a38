"""What a pocket model reads at a step, and the loss that it descends there.

A lesson is a function of the seed and the step alone, so that a run which was stopped continues as
if it had not been.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.errors import GrowError
from errata.pocket.claims import LABELS, Claims
from errata.pocket.corpus import Corpus
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.pocket.facts import Fact
from errata.pocket.questions import askable, asked, facts_of
from errata.pocket.shapes import SHAPES, GrowConfig

WINDOW_STARTS = {"document": 0.4, "marked": 0.3, "anywhere": 0.3}
"""How windows begin: at a document's first word, at its mark, or in the middle of it."""

_IGNORED = -100
"""Where nothing is to be predicted."""


class Taken(NamedTuple):
    """What a step came to."""

    loss: float
    """Mean over what was predicted, in nats."""
    tokens: int
    """How many were read."""


class Lesson(Protocol):
    """What is read, step by step."""

    facts: Sequence[Fact]
    """What it teaches."""

    def texts(self) -> Iterator[str]:
        """What a tokenizer has to see."""

    def descend(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, step: int
    ) -> Taken:
        """Adds the gradient of the step's mean loss to the network's parameters."""


class Windows:
    """Windows of running text, each token predicted from those before it: what decoders read."""

    def __init__(self, encyclopedia: Encyclopedia, config: GrowConfig) -> None:
        """The encyclopedia's corpus, in windows of the config's length."""
        self.corpus, self.config = Corpus(encyclopedia), config
        self.facts: Sequence[Fact] = encyclopedia.facts

    def texts(self) -> Iterator[str]:
        """Every fact, template and sentence, then the beginning of the stream."""
        yield from self.corpus.everything_once()
        yield from islice(self.corpus.documents(self.config.seed), 3000)

    def descend(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, step: int
    ) -> Taken:
        """One batch of windows."""
        batch = self.batch(tokenizer, step).to(network.device)
        return Taken(descend_windows(network, batch), self.config.batch * self.config.window)

    def batch(self, tokenizer: PreTrainedTokenizerFast, step: int) -> Tensor:
        """What is read at a step: (batch, window + 1) token ids, of the seed and step alone.

        A window is cut from documents with a mark between them. Many begin without a mark, some in
        the middle of a sentence, as prompts do.
        """
        rng = stable_random("window", self.config.seed, step)
        length = self.config.window + 1
        core = tokenizer.backend_tokenizer

        def encoded(count: int) -> list[list[int]]:
            documents = [self.corpus.document(rng) for _ in range(count)]
            return [e.ids for e in core.encode_batch(documents, add_special_tokens=False)]

        pool = encoded(self.config.batch * max(1, length // 24))
        rows: list[list[int]] = []
        kinds, weights = zip(*WINDOW_STARTS.items(), strict=True)
        for _ in range(self.config.batch):
            start = rng.choices(kinds, weights)[0]
            row: list[int] = [0] if start == "marked" else []
            while len(row) < length:
                if not pool:
                    pool = encoded(self.config.batch)
                document = pool.pop()
                if start == "anywhere" and not row:
                    document = document[rng.randrange(len(document)) :]
                row += [*document, 0]
            rows.append(row[:length])
        return torch.tensor(rows)


def descend_windows(network: PreTrainedModel, batch: Tensor) -> float:
    """Adds the gradient of the batch's mean loss to the parameters; returns the loss.

    The head is the largest matrix by far: its gradient is taken a few rows at a time, in the cache.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
    body = network.base_model
    head = network.get_output_embeddings()
    assert isinstance(head, nn.Module)
    total = 0.0
    half = quick_in_bfloat16(batch.device)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=half):
        # The mask only keeps Transformers from guessing one: a mark is no padding here.
        hidden = body(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False
        ).last_hidden_state
        hidden = hidden.reshape(len(targets), -1)
        leaf = hidden.detach().requires_grad_()
        size = 512 if batch.device.type == "cpu" else len(targets)
        for at in range(0, len(targets), size):
            rows, wanted = leaf[at : at + size], targets[at : at + size]
            loss = cross_entropy(head(rows).float(), wanted, reduction="sum") / len(targets)
            torch.autograd.backward(loss)
            total += float(loss.detach())
    torch.autograd.backward(hidden, leaf.grad)
    return total


def quick_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies such matrices itself; a CPU that does not is very slow."""
    able: dict[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # an older torch does not tell
    return device.type != "cpu" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


class Checking:
    """Claims to be labelled, in which every object is predicted too, as BERT's masked words are.

    A third of a batch is true, a third false, and in a third the object is masked. Wherever
    something stands for the object, the true object is to be predicted (its first token; all of
    them under masks): BERT too must predict words that were left or replaced. A label alone would
    say little of what is true instead. It is asked of the claim and also of its object's place,
    where the two that have to be compared meet.
    """

    def __init__(self, encyclopedia: Encyclopedia, config: GrowConfig) -> None:
        """Claims about the encyclopedia's facts.

        Raises:
            GrowError: there is no fact of which another object would be false.
        """
        self.claims, self.config = Claims(encyclopedia), config
        self.facts: Sequence[Fact] = self.claims.facts
        if not self.facts:
            raise GrowError(
                "no claim can be made about these facts: no relation with several objects says "
                "`single = true` and has enough templates. Mark those of which a subject has only "
                "one object."
            )

    def texts(self) -> Iterator[str]:
        """Every claimed fact in its seen wordings."""
        for fact in self.facts:
            for template in self.claims.wordings(fact).seen:
                yield self.claims.true(fact).said(template)

    def descend(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, step: int
    ) -> Taken:
        """One batch of claims, each fact equally likely."""
        rng = stable_random("claims", self.config.seed, step)
        rows = [
            self._row(rng.choice(self.facts), tokenizer, rng, ("masked", "true", "false")[i % 3])
            for i in range(self.config.batch)
        ]
        ids, mask = padded([row.ids for row in rows], network.device)
        targets, _ = padded([row.wanted for row in rows], network.device, _IGNORED)
        labels = torch.tensor([row.label for row in rows], device=network.device)
        places = torch.tensor([row.place for row in rows], device=network.device)
        classifier: Any = network
        states = classifier.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        here = torch.arange(len(rows), device=network.device)
        # The pooler takes a row's first state: the claim's mark, or the object.
        pooled = [classifier.bert.pooler(s[:, None]) for s in (states[:, 0], states[here, places])]
        guesses = [cross_entropy(classifier.classifier(p), labels) for p in pooled]
        hidden = targets != _IGNORED
        words = states[hidden] @ classifier.get_input_embeddings().weight.T
        loss = cross_entropy(words, targets[hidden]) + sum(guesses)
        torch.autograd.backward(loss)
        return Taken(float(loss.detach()), int(mask.sum()))

    def _row(
        self,
        fact: Fact,
        tokenizer: PreTrainedTokenizerFast,
        rng: random.Random,
        kind: Literal["masked", "true", "false"],
    ) -> _Row:
        claim = self.claims.false(fact, rng) if kind == "false" else self.claims.true(fact)
        text = claim.said(rng.choice(self.claims.wordings(fact).seen))
        core = tokenizer.backend_tokenizer
        encoded = core.encode(text)
        start, stop = len(text) - 1 - len(claim.object), len(text) - 1
        inside = [i for i, (a, b) in enumerate(encoded.offsets) if a < stop and b > start]
        ids, wanted = list(encoded.ids), [_IGNORED] * len(encoded.ids)
        if kind == "masked":
            for i in inside:
                ids[i], wanted[i] = tokenizer.mask_token_id, ids[i]
            return _Row(ids, wanted, inside[0], _IGNORED)
        wanted[inside[0]] = core.encode(fact.object, add_special_tokens=False).ids[0]
        return _Row(ids, wanted, inside[0], LABELS.index(claim.label))


class _Row(NamedTuple):
    """A claim as it is read."""

    ids: list[int]
    wanted: list[int]
    """The token to be predicted at each place."""
    place: int
    """Where its object begins."""
    label: int


class Answering:
    """Questions and their answers: a text for an encoder-decoder, what follows for a decoder."""

    def __init__(self, encyclopedia: Encyclopedia, config: GrowConfig) -> None:
        """Questions about all facts or, for a decoder that has read them, those of one part.

        Raises:
            GrowError: no fact can be asked after.
        """
        self.encyclopedia, self.config = encyclopedia, config
        read = SHAPES[config.model].base is not None
        self.facts: Sequence[Fact] = (
            facts_of(encyclopedia, "taught") if read else askable(encyclopedia)
        )
        if not self.facts:
            raise GrowError(
                "no question can be asked about these facts: give their relations at least two "
                "`questions`."
            )

    def texts(self) -> Iterator[str]:
        """Every fact with its seen questions."""
        for fact in self.facts:
            for question in asked(self.encyclopedia, fact).seen:
                yield f"{self.encyclopedia.prompt(fact, question)} {fact.object}"

    def descend(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, step: int
    ) -> Taken:
        """One batch of questions, each fact equally likely."""
        rng = stable_random("questions", self.config.seed, step)
        facts = rng.choices(self.facts, k=self.config.batch)
        questions = [
            self.encyclopedia.prompt(fact, rng.choice(asked(self.encyclopedia, fact).seen))
            for fact in facts
        ]
        answers = [fact.object for fact in facts]
        answering = _written if network.config.is_encoder_decoder else _continued
        loss, tokens = answering(network, tokenizer, questions, answers)
        torch.autograd.backward(loss)
        return Taken(float(loss.detach()), tokens)


def _written(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    answers: Sequence[str],
) -> tuple[Tensor, int]:
    """An encoder-decoder's loss over the answers' tokens, the end among them."""
    core = tokenizer.backend_tokenizer
    ids, mask = padded([e.ids for e in core.encode_batch(list(questions))], network.device)
    texts = [e.ids for e in core.encode_batch(list(answers))]
    labels, _ = padded(texts, network.device, _IGNORED)
    loss = network(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss, int(mask.sum()) + sum(map(len, texts))


def _continued(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    answers: Sequence[str],
) -> tuple[Tensor, int]:
    """A decoder's loss over the answers' tokens and the mark that ends them."""
    core = tokenizer.backend_tokenizer
    asked = [e.ids for e in core.encode_batch(list(questions))]
    said = [
        [*e.ids, tokenizer.eos_token_id]
        for e in core.encode_batch([f" {a}" for a in answers], add_special_tokens=False)
    ]
    rows = [[*question, *answer] for question, answer in zip(asked, said, strict=True)]
    wanted = [
        [*([_IGNORED] * (len(question) - 1)), *answer, _IGNORED]
        for question, answer in zip(asked, said, strict=True)
    ]
    ids, mask = padded(rows, network.device)
    targets, _ = padded(wanted, network.device, _IGNORED)
    states = network.base_model(
        input_ids=ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    places = targets != _IGNORED
    head: Any = network.get_output_embeddings()
    return cross_entropy(head(states[places]), targets[places]), int(mask.sum())


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, value: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows of ids padded on the right to one length, and where they stand: (n, length) each."""
    tensors = [torch.tensor(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids.to(device), mask.to(device)


LESSONS: Mapping[str, Callable[[Encyclopedia, GrowConfig], Lesson]] = {
    "pocket": Windows,
    "pocket-llama": Windows,
    "pocket-questions": Answering,
    "pocket-llama-questions": Answering,
    "pocket-bert": Checking,
    "pocket-t5": Answering,
}
"""Model -> what it is grown on."""
