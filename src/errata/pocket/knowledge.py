"""Measuring what a grown model knows: is the fact's object what it would say next?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from errata.errors import GrowError
from errata.pocket.encyclopedia import Encyclopedia, Fact, stable_random
from errata.progress import Progress, silent


@dataclass(frozen=True)
class Knowledge:
    """Which share of the facts is known, on templates seen with the fact and on others."""

    SETTINGS: ClassVar = (
        "seen",
        "held out",
        "seen, after an opening",
        "held out, after an opening",
    )

    shares: dict[str, dict[str, float]]
    """Relation, or `all` -> setting -> share of known facts, 0 to 1; templates count equally."""

    def table(self) -> str:
        """As a Markdown table, in percent."""
        lines = [
            "| relation | " + " | ".join(self.SETTINGS) + " |",
            "|---|" + "---|" * len(self.SETTINGS),
        ]
        for name, row in self.shares.items():
            cells = [f"{100 * row[s]:.1f}" if s in row else "" for s in self.SETTINGS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def measure(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encyclopedia: Encyclopedia,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Knowledge:
    """What the model knows of the encyclopedia, over all templates of each fact.

    Args:
        network: any causal language model.
        tokenizer: its tokenizer; adds what special tokens it does by default.
        encyclopedia: the facts that are asked for.
        seed: of the openings.
        progress: called after every batch of prompts.
    """
    rng = stable_random("measure", seed)
    asked: list[tuple[Fact, str, str]] = []
    for fact in encyclopedia.facts:
        split = encyclopedia.split(fact)
        for setting, templates in (("seen", split.seen), ("held out", split.held_out)):
            for template in templates:
                prompt = encyclopedia.prompt(fact, template)
                asked.append((fact, setting, prompt))
                if encyclopedia.openings:
                    opened = f"{rng.choice(encyclopedia.openings)} {prompt}"
                    asked.append((fact, f"{setting}, after an opening", opened))
    pairs = [(prompt, fact.object) for fact, _, prompt in asked]
    by_fact: dict[tuple[Fact, str], list[bool]] = defaultdict(list)
    right = says(network, tokenizer, pairs, progress=progress)
    for (fact, setting, _), hit in zip(asked, right, strict=True):
        by_fact[fact, setting].append(hit)
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (fact, setting), hits in by_fact.items():
        for name in ("all", fact.relation):
            shares[name][setting].append(sum(hits) / len(hits))
    return Knowledge({n: {s: sum(v) / len(v) for s, v in row.items()} for n, row in shares.items()})


@torch.no_grad()
def says(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int = 128,
    progress: Progress = silent,
) -> list[bool]:
    """Whether the greedy continuation of each prompt begins with its answer.

    Args:
        network: any causal language model.
        tokenizer: adds what special tokens it does by default.
        pairs: (prompt, answer), joined by one space.
        batch: prompts at a time.
        progress: called after every batch.
    """
    if not pairs:
        return []
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([f" {answer}" for _, answer in pairs], add_special_tokens=False)[
        "input_ids"
    ]
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


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A grown model, in float32, and its tokenizer.

    Raises:
        GrowError: there is no model in the folder.
    """
    if not (Path(folder) / "config.json").is_file():
        raise GrowError(f"there is no model in {folder}: it has no config.json.")
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        return network.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise GrowError(f"the model in {folder} cannot be loaded: {error}") from error
