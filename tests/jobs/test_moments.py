"""Second moments ahead of time: what they cost, where they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata.errors import ConfigError, DatasetError
from errata.jobs.moments import background_for, compute, plan
from errata.lm.load import LanguageModel


def test_a_plan_tells_and_compute_keeps(tiny_gpt2: LanguageModel, corpus_file: Path) -> None:
    planned = plan(tiny_gpt2, layers=[0, 2], corpus=corpus_file, tokens=600)
    assert planned.seconds > 0 and planned.nbytes > 0 and planned.corpus_name == str(corpus_file)
    found = compute(planned)
    assert found.layers == (0, 2) and found.tokens == 600
    assert len(list(planned.folder.glob("*.safetensors"))) >= 2
    read: list[str] = []
    again = compute(planned, progress=lambda stage, done, total: read.append(stage))
    assert again.key == found.key and read == []


def test_the_methods_layers_are_the_default(tiny_gpt2: LanguageModel, corpus_file: Path) -> None:
    planned = plan(tiny_gpt2, corpus=corpus_file, tokens=600)
    assert planned.layers and max(planned.layers) < tiny_gpt2.layers


def test_what_is_wrong_is_told_before_the_pass(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(ConfigError):
        plan(tiny_gpt2, layers=[9], tokens=600)
    with pytest.raises(DatasetError, match="no file"):
        plan(tiny_gpt2, layers=[1], corpus="absent.txt", tokens=600)


def test_a_pocket_model_gets_its_own_statements(tiny_gpt2: LanguageModel) -> None:
    assert background_for(tiny_gpt2).corpus is None
    tiny_gpt2.name = "pocket"
    corpus = background_for(tiny_gpt2).corpus
    assert isinstance(corpus, list) and len(" ".join(corpus).split()) >= 80_000
