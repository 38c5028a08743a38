"""Measuring what a grown model knows: is the fact's object what it would say, or its claim true?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from errata.errors import GrowError
from errata.pocket.claims import LABELS, Claims
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.pocket.facts import Fact
from errata.pocket.lessons import padded
from errata.pocket.questions import askable, asked, part_of
from errata.progress import Progress, silent

_BATCH = 128
"""Prompts at a time."""


class Asked(NamedTuple):
    """One thing that a model is asked."""

    fact: Fact
    setting: str
    """Where it is counted, e.g. `held out`."""
    prompt: str
    answer: str


@dataclass(frozen=True)
class Knowledge:
    """Which share of the facts is known, in settings such as templates seen with the fact."""

    shares: dict[str, dict[str, float]]
    """Relation, or `all` -> setting -> share of known facts, 0 to 1; prompts count equally."""

    @classmethod
    def of(cls, asked: Sequence[Asked], right: Sequence[bool]) -> Knowledge:
        """From single answers: averaged over a fact's prompts first, then over facts."""
        by_fact: dict[tuple[Fact, str], list[bool]] = defaultdict(list)
        for one, hit in zip(asked, right, strict=True):
            by_fact[one.fact, one.setting].append(hit)
        shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (fact, setting), hits in by_fact.items():
            for name in ("all", fact.relation):
                shares[name][setting].append(sum(hits) / len(hits))
        return cls({n: {s: sum(v) / len(v) for s, v in row.items()} for n, row in shares.items()})

    @property
    def settings(self) -> list[str]:
        """The table's columns."""
        return list(self.shares["all"])

    def table(self) -> str:
        """As a Markdown table, in percent."""
        lines = [
            "| relation | " + " | ".join(self.settings) + " |",
            "|---|" + "---|" * len(self.settings),
        ]
        for name, row in self.shares.items():
            cells = [f"{100 * row[s]:.1f}" if s in row else "" for s in self.settings]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def measure(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encyclopedia: Encyclopedia,
    *,
    seed: int = 0,
    tuned: bool = False,
    progress: Progress = silent,
) -> Knowledge:
    """What a model knows of the encyclopedia, over all wordings of each fact.

    Decoders continue statements, encoder-decoders answer questions, classifiers check claims.

    Args:
        network: any causal language model, encoder-decoder, or classifier of claims.
        tokenizer: its tokenizer; adds what special tokens it does by default.
        encyclopedia: the facts that are asked for.
        seed: of the openings and of false claims.
        tuned: whether a decoder was tuned on questions, and is to answer them.
        progress: called after every batch of prompts.
    """
    if _is_classifier(type(network).__name__):
        claims = all_claims(encyclopedia, seed)
        return Knowledge.of(claims, checks(network, tokenizer, claims, progress=progress))
    if network.config.is_encoder_decoder:
        questions = all_questions(encyclopedia)
        return Knowledge.of(questions, answers(network, tokenizer, questions, progress=progress))
    if tuned:
        questions = tuned_questions(encyclopedia)
        pairs = [(one.prompt, one.answer) for one in questions]
        found = says(network, tokenizer, pairs, ended=True, progress=progress)
        return Knowledge.of(questions, found)
    statements = all_statements(encyclopedia, seed)
    pairs = [(one.prompt, one.answer) for one in statements]
    return Knowledge.of(statements, says(network, tokenizer, pairs, progress=progress))


def all_statements(encyclopedia: Encyclopedia, seed: int) -> list[Asked]:
    """The beginning of every fact in every template, by itself and after an opening."""
    rng = stable_random("measure", seed)
    found: list[Asked] = []
    for fact in encyclopedia.facts:
        for setting, templates in encyclopedia.split(fact).named():
            for template in templates:
                prompt = encyclopedia.prompt(fact, template)
                found.append(Asked(fact, setting, prompt, fact.object))
                if encyclopedia.openings:
                    opened = f"{rng.choice(encyclopedia.openings)} {prompt}"
                    after = f"{setting}, after an opening"
                    found.append(Asked(fact, after, opened, fact.object))
    return found


def all_questions(encyclopedia: Encyclopedia) -> list[Asked]:
    """Every question about every fact."""
    return [
        Asked(fact, setting, encyclopedia.prompt(fact, question), fact.object)
        for fact in askable(encyclopedia)
        for setting, questions in asked(encyclopedia, fact).named()
        for question in questions
    ]


def tuned_questions(encyclopedia: Encyclopedia) -> list[Asked]:
    """All questions; those about facts that a decoder was tuned on are counted by themselves."""
    return [
        one._replace(setting=f"{whose}, {one.setting}")
        for one in all_questions(encyclopedia)
        for whose in ["taught" if part_of(one.fact) == "taught" else "not taught"]
    ]


def all_claims(encyclopedia: Encyclopedia, seed: int) -> list[Asked]:
    """Every claim that can be made in every wording: the true one, and a false one for each."""
    claims = Claims(encyclopedia)
    found = []
    for fact in claims.facts:
        rng = stable_random("measure", seed, fact.subject, fact.relation)
        for setting, templates in claims.wordings(fact).named():
            for template in templates:
                for kind, claim in (
                    ("true", claims.true(fact)),
                    ("false", claims.false(fact, rng)),
                ):
                    column = f"{setting}, {kind}"
                    found.append(Asked(fact, column, claim.said(template), claim.label))
    return found


@torch.no_grad()
def says(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int = _BATCH,
    ended: bool = False,
    progress: Progress = silent,
) -> list[bool]:
    """Whether the greedy continuation of each prompt begins with its answer.

    Args:
        network: any causal language model.
        tokenizer: adds what special tokens it does by default.
        pairs: (prompt, answer), joined by one space.
        batch: prompts at a time.
        ended: whether the text must end after the answer.
        progress: called after every batch.
    """
    if not pairs:
        return []
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([f" {answer}" for _, answer in pairs], add_special_tokens=False)[
        "input_ids"
    ]
    if ended:
        answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]) + len(answers[i]))
    right = [True] * len(pairs)
    head = network.get_output_embeddings()
    assert isinstance(head, nn.Module)
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        rows = [torch.tensor([*prompts[i], *answers[i]]) for i in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(network.device)
        # Padding stands on the right, where nothing that is scored attends to it.
        hidden = network.base_model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).last_hidden_state
        owners = [i for i in chosen for _ in answers[i]]
        r = torch.tensor([row for row, i in enumerate(chosen) for _ in answers[i]])
        c = torch.tensor([len(prompts[i]) + k - 1 for i in chosen for k in range(len(answers[i]))])
        hits = head(hidden[r, c]).argmax(-1) == ids[r, c + 1]
        for i, hit in zip(owners, hits.tolist(), strict=True):
            right[i] &= hit
        progress("measuring", at + len(chosen), len(order))
    return right


@torch.no_grad()
def answers(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Asked],
    *,
    progress: Progress = silent,
) -> list[bool]:
    """Whether an encoder-decoder's greedy answer to each question is the right one, no more."""
    right: list[bool] = []
    for at in range(0, len(questions), _BATCH):
        some = questions[at : at + _BATCH]
        ids, mask = padded(tokenizer([q.prompt for q in some])["input_ids"], network.device)
        wanted, places = padded(tokenizer([q.answer for q in some])["input_ids"], network.device)
        logits = network(
            input_ids=ids, attention_mask=mask, labels=wanted, use_cache=False
        ).logits  # an earlier mistake would show at its own place
        right += ((logits.argmax(-1) == wanted) | (places == 0)).all(-1).tolist()
        progress("measuring", len(right), len(questions))
    return right


@torch.no_grad()
def checks(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    claims: Sequence[Asked],
    *,
    progress: Progress = silent,
) -> list[bool]:
    """Whether a classifier gives each claim its label."""
    right: list[bool] = []
    for at in range(0, len(claims), _BATCH):
        some = claims[at : at + _BATCH]
        ids, mask = padded(tokenizer([claim.prompt for claim in some])["input_ids"], network.device)
        found = network(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
        right += [LABELS[label] == claim.answer for label, claim in zip(found, some, strict=True)]
        progress("measuring", len(right), len(claims))
    return right


def _is_classifier(architecture: str) -> bool:
    """Whether a network called so chooses a label."""
    return architecture.endswith("ForSequenceClassification")


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A grown model, in float32, and its tokenizer.

    Raises:
        GrowError: there is no model in the folder.
    """
    if not (Path(folder) / "config.json").is_file():
        raise GrowError(f"there is no model in {folder}: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if any(map(_is_classifier, config.architectures or [])):
            auto = AutoModelForSequenceClassification
        network = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return network.eval(), tokenizer
    except (OSError, ValueError) as error:
        raise GrowError(f"the model in {folder} cannot be loaded: {error}") from error
