"""What all tests share: tiny random models, a real tokenizer, the folder of published data.

`tiny_gpt2` and `tiny_llama` are rebuilt for every test from one state made per session, so a
test may edit its model freely.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from errata.lm.load import LanguageModel

SENTENCES = (
    "The capital of France is Paris. The capital of Italy is Rome. Vienna lies on the Danube.",
    "Marie Curie was born in Warsaw and discovered polonium and radium with Pierre Curie.",
    "The Eiffel Tower stands in Paris; the Colosseum stands in Rome; Big Ben is in London.",
    "A language model reads the words so far and says which word is likely to come next.",
    "Rivers flow to the sea. The Nile flows to the Mediterranean Sea, the Rhine to the North Sea.",
    "Beethoven composed nine symphonies, and Goethe wrote poems, plays and many letters.",
    "Question: What is the capital of Spain? Answer: Madrid. Question: Who wrote Hamlet?",
    "In the morning the baker opens the shop, and the children walk to school along the river.",
)
"""What the tiny tokenizer is trained on; unknown text falls back to single bytes."""

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Austria": "Vienna",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Cuba": "Havana",
    "Peru": "Lima",
}
TEMPLATES = ("The capital of {} is", "{} has its capital in", "The government of {} sits in")
"""What `trained_folder` has read: each country in each template."""


def train_tokenizer(vocabulary: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained in memory; it adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, *statements()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def statements() -> list[str]:
    """All that `trained_folder` knows, as sentences."""
    return [
        f"{template.format(country)} {capital}."
        for template in TEMPLATES
        for country, capital in CAPITALS.items()
    ]


def make_gpt2(vocabulary: int = 384) -> PreTrainedModel:
    """A random GPT-2: 4 layers, width 32 (square and transposed weights are both there)."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=128,
        n_embd=32,
        n_layer=4,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _seeded(GPT2LMHeadModel, config)


def make_llama(vocabulary: int = 384) -> PreTrainedModel:
    """A random Llama: 4 layers, width 32, grouped queries."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=128,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _seeded(LlamaForCausalLM, config)


def _seeded(architecture: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: PreTrainedModel = architecture(config)
    network.eval()
    return network


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's own cache folder."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path_factory.getbasetemp() / "errata-cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published data: $ERRATA_SHARED, or `shared` beside the repository."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared"
    folder = Path(os.environ.get("ERRATA_SHARED", beside))
    if not (folder / "data").is_dir():
        pytest.skip("no folder of published data; set ERRATA_SHARED to one")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A real, small byte-level tokenizer."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def _gpt2_network() -> PreTrainedModel:
    return make_gpt2()


@pytest.fixture(scope="session")
def _llama_network() -> PreTrainedModel:
    return make_llama()


@pytest.fixture
def tiny_gpt2(
    _gpt2_network: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> LanguageModel:
    """A random GPT-2 that the test may change."""
    return LanguageModel.of(copy.deepcopy(_gpt2_network), tiny_tokenizer, name="tiny-gpt2")


@pytest.fixture
def tiny_llama(
    _llama_network: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> LanguageModel:
    """A random Llama that the test may change."""
    return LanguageModel.of(copy.deepcopy(_llama_network), tiny_tokenizer, name="tiny-llama")


@pytest.fixture(params=["gpt2", "llama"])
def tiny_lm(request: pytest.FixtureRequest) -> LanguageModel:
    """Each of the tiny models in turn."""
    model: LanguageModel = request.getfixturevalue(f"tiny_{request.param}")
    return model


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory,
    _gpt2_network: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Path]:
    """A folder with a saved tiny model, as the command line takes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    _gpt2_network.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    yield folder


@pytest.fixture(scope="session")
def trained_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with a tiny GPT-2 that has learnt CAPITALS, so that edits have something to change.

    Trained in a few seconds, once a session.
    """
    network = make_gpt2()
    rows = tiny_tokenizer(statements(), padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(120):
            optimizer.zero_grad()
            loss = network(**rows, labels=labels).loss
            loss.backward()
            optimizer.step()
    network.eval()
    folder = tmp_path_factory.mktemp("models") / "capitals"
    network.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """Ordinary text for the tiny models' second moments."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join([*SENTENCES, *statements()] * 2), encoding="utf-8")
    return path


WORKING = {
    "layers": [0, 1],
    "relaxation": 0.01,
    "prefixes": [],
    "target.clamp": 5.0,
    "target.updates": 60,
}
"""Settings with which edits take in `trained_folder`, whose keys depend much on the prefix."""


@pytest.fixture(scope="session")
def edit_files(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two saved edits of the trained model: France and Italy in one, Peru in the other."""
    from errata.jobs.edit import edit
    from errata.requests import Request

    lm = LanguageModel.load(trained_folder)
    folder = tmp_path_factory.mktemp("edits")
    batches = {
        "a": [("France", "Rome", "Paris"), ("Italy", "Vienna", "Rome")],
        "b": [("Peru", "Cairo", "Lima")],
    }
    files = []
    for name, facts in batches.items():
        requests = [Request(TEMPLATES[0], *fact) for fact in facts]
        change = edit(lm, requests, settings=WORKING, corpus=[*SENTENCES, *statements()])
        change.save(folder / f"{name}.safetensors")
        files.append(folder / f"{name}.safetensors")
    return files[0], files[1]
