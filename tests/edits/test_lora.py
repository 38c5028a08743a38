"""Adapters: PEFT loads them, and they are the edit."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from errata.edits.edit import Edit
from errata.edits.lora import to_lora
from errata.edits.stack import Stack
from errata.errors import ConfigError, NotFiniteError, StorageError, WrongModelError
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from tests.edits.making import make_edit, same_bits, weights

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("stacked", [False, True])
def test_peft_says_what_the_edited_model_says(
    tiny_lm: LanguageModel, tmp_path: Path, stacked: bool
) -> None:
    peft = pytest.importorskip("peft")
    edit: Edit = make_edit(tiny_lm, 0, layers=(1, 2), size=1.0)
    if stacked:  # ranks then differ from layer to layer: 2, 4, 2
        edit = Stack([edit, make_edit(tiny_lm, 1, layers=(2, 3), size=1.0)])
    before = weights(tiny_lm)
    to_lora(edit, tiny_lm, tmp_path / "new" / "adapter")
    assert same_bits(weights(tiny_lm), before)
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(tiny_lm.network), tmp_path / "new" / "adapter"
    )
    with torch.no_grad():
        plain = tiny_lm.network(IDS).logits
        found = adapted(IDS).logits
        with edit.applied(tiny_lm):
            wanted = tiny_lm.network(IDS).logits
            edited = weights(tiny_lm)
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload().state_dict()
    for name, weight in edited.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-5)


def test_scale_is_one_for_each_module(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    to_lora(make_edit(tiny_gpt2), tiny_gpt2, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {2}
    assert config["fan_in_fan_out"] is True
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_refusals(tiny_gpt2: LanguageModel, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    edit = make_edit(tiny_gpt2)
    with pytest.raises(WrongModelError):
        to_lora(edit, tiny_llama, tmp_path)
    with pytest.raises(ConfigError, match="changes nothing"):
        to_lora(Stack([]), tiny_gpt2, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        to_lora(edit, tiny_gpt2, tmp_path / "file")
    edit.changes[tiny_gpt2.mlp_out_path(1)].left[0, 0] = float("nan")
    with pytest.raises(NotFiniteError):
        to_lora(edit, tiny_gpt2, tmp_path)
    weight_out_in(tiny_gpt2.mlp_out(1)).mul_(2)
    with pytest.raises(NotFiniteError):
        to_lora(edit, tiny_gpt2, tmp_path)
    assert os.listdir(tmp_path) == ["file"]
