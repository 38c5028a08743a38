"""What a key depends on, and what it does not."""

from __future__ import annotations

import ast
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ModelLoadError
from errata.jobs.cases import sample_cases
from errata.jobs.studies import keys
from errata.jobs.studies.keys import cases_hash, code_hash, model_hash, text_hash, unit_key
from errata.jobs.studies.units import UNEDITED, Unit, checked

UNIT = Unit("pocket", "MEMIT", "memit", count=5)
HASHES = {"model": "m", "cases": "c", "text": "t", "code": "k"}


def key(**fields: Any) -> str:
    return unit_key(checked(replace(UNIT, **fields)), **HASHES)


def test_names_are_no_part_of_a_key() -> None:
    assert key() == key(label="other")
    assert key() == unit_key(replace(UNIT, data="elsewhere", count=None), **HASHES)


def test_settings_that_say_the_default_or_the_recipe_are_no_part_of_a_key() -> None:
    assert key() == key(settings={"relaxation": 0.05, "target": {"kl": 0.0625}})
    assert key() == key(settings={"layers": [0, 1, 2]})  # the pocket model's recipe


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "emmet"},
        {"settings": {"relaxation": 0.06}},
        {"settings": {"target": {"kl": 0.1}}},
        {"settings": {"layers": "auto:tracing"}},
        {"seed": 1},
        {"protocol": "batch", "batch": 2},
        {"protocol": "sequential"},
        {"protocol": "sequential", "every": 2},
        {"protocol": "sequential", "stop": {"retention": 0.5}},
        {"metrics": ("probability", "free")},
        {"generation": True},
        {"generation": True, "generation_count": 2},
        {"dtype": "bfloat16"},
        {"model": "gpt2-xl"},  # another recipe
        {"method": UNEDITED},
        {"variant": "fact-erasure"},
        {"variant": "error-injection"},  # of known facts alone
    ],
)
def test_what_changes_numbers_changes_the_key(fields: dict[str, Any]) -> None:
    others = [key(), key(seed=2), key(protocol="sequential", every=3)]
    assert key(**fields) not in others


@pytest.mark.parametrize("name", HASHES)
def test_every_hash_is_part_of_the_key(name: str) -> None:
    assert unit_key(UNIT, **HASHES) != unit_key(UNIT, **HASHES | {name: "other"})


def test_a_models_hash_is_that_of_its_files(tmp_path: Path, trained_folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained_folder, copy)
    assert model_hash(str(copy)) == model_hash(str(trained_folder))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_hash(str(copy)) != model_hash(str(trained_folder))
    with pytest.raises(ModelLoadError):
        model_hash("no-such-model-anywhere")


def test_cases_and_text_have_hashes_of_all_they_say() -> None:
    cases = sample_cases("pocket", 5, 0)
    assert cases_hash(cases) == cases_hash(sample_cases("pocket", 5, 0))
    other = [*cases[:4], replace(cases[4], paraphrases=("Something else",))]
    assert cases_hash(cases) != cases_hash(other)
    texts = {text_hash(replace(UNIT, **f)) for f in ({}, {"corpus_tokens": 9}, {"method": "none"})}
    assert len(texts) == 3


def test_explaining_code_does_not_change_its_hash() -> None:
    def code(source: str) -> str:
        return keys._code(ast.parse(source))

    plain = "def f(x):\n    return x + 1\n"
    told = '"""A module."""\n# why\ndef f(\n    x,\n):\n    """Adds one."""\n    return x + 1\n'
    assert code(plain) == code(told)
    assert code(plain) != code(plain.replace("1", "2"))
    assert code("x = 'text'") != code("x = 'other'")


def test_the_code_that_counts_is_what_the_method_imports() -> None:
    assert code_hash("memit") != code_hash("emmet") != code_hash(UNEDITED)
    memit = [
        keys._file(name) for name in keys._imported(parsed("errata.editors.closed_form.memit"))
    ]
    assert keys._file("errata.editors.closed_form.closed_form") in memit
    assert keys._file("errata.jobs") is not None and keys._file("errata.jobs.nothing") is None


def parsed(module: str) -> ast.Module:
    file = keys._file(module)
    assert file is not None
    return ast.parse(file.read_text(encoding="utf-8"))


def test_a_unit_without_a_variant_does_not_know_of_any() -> None:
    """What was described before there were variants has the same key still."""
    assert "variant" not in UNIT.to_dict() and Unit.from_dict(UNIT.to_dict()) == UNIT
    posed = replace(UNIT, variant="fact-erasure")
    assert Unit.from_dict(posed.to_dict()) == posed and "fact-erasure" in str(posed)
