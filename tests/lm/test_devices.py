"""Models on several devices, in part on disk, or cut into parts: they work or say why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from errata.editors import Background
from errata.editors.closed_form.statistics import collect
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, ModelLoadError
from errata.jobs.methods import editor_for
from errata.lm.generate import complete
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.measure.score import Scores, score
from errata.requests import Case, Request
from tests.conftest import SENTENCES, TEMPLATES, WORKING, make_llama, statements
from tests.lm.pretended import pretended_devices, spread_over_devices

REQUESTS = [Request(TEMPLATES[0], country, "Paris", "Rome") for country in ("Italy", "Spain")]
CASES = [Case(request) for request in REQUESTS]
TEXT = [*SENTENCES, *statements()] * 3
TWO = {  # a model cut in the middle, as a device map for two devices does
    "gpt2": {"transformer.wte": 1, "transformer.wpe": 1, "transformer.ln_f": 2, "lm_head": 2}
    | {f"transformer.h.{i}": 1 + i // 2 for i in range(4)},
    "llama": {"model.embed_tokens": 1, "model.rotary_emb": 1, "model.norm": 2, "lm_head": 2}
    | {f"model.layers.{i}": 1 + i // 2 for i in range(4)},
}


def edit(lm: LanguageModel, layers: list[int], method: str = "memit") -> WeightEdit:
    settings = WORKING | {"layers": layers, "target.updates": 3, "target.stop_below": 1e3}
    made = editor_for(lm, method, settings, Background(TEXT)).edit(lm, REQUESTS)
    assert isinstance(made, WeightEdit)
    return made


def scored(lm: LanguageModel) -> Scores:
    return score(lm, CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A saved Llama, whose head is not tied to its embedding."""
    folder = tmp_path_factory.mktemp("devices") / "llama"
    make_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def placed(**elsewhere: str) -> dict[str, str]:
    """The saved Llama on the CPU, but for some parts, by the end of their paths."""
    paths = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    paths += [f"model.layers.{layer}" for layer in range(4)]
    return {path: elsewhere.get(path.split(".")[-1], "cpu") for path in paths}


def block(layer: int, where: str = "disk") -> dict[str, str]:
    return placed(**{str(layer): where})


# -------------------------------------------------------------------------------- several devices


def test_pretended_devices_refuse_to_be_mixed() -> None:
    with pretended_devices():
        one, two = torch.ones(2, device="cpu:1"), torch.tensor([1.0, 2.0], device="cpu:2")
        assert str((one + 1).device) == "cpu:1" and (one + two.to(one)).tolist() == [2.0, 3.0]
        for other in (two, torch.ones(2)):
            with pytest.raises(RuntimeError, match="same device"):
                one + other


@pytest.mark.parametrize("layers", [[0, 1], [1, 2]])
def test_a_model_on_two_devices_is_edited_and_scored(
    tiny_lm: LanguageModel, layers: list[int]
) -> None:
    """Bit for bit as on one; what is added to a weight is computed where the weight is."""
    alone = edit(tiny_lm, layers)
    with alone.applied(tiny_lm):
        wanted, text = scored(tiny_lm), complete(tiny_lm, ["The capital"], new_tokens=8, top_k=5)
    with pretended_devices():
        spread_over_devices(tiny_lm.network, TWO[tiny_lm.config.model_type])
        assert str(tiny_lm.device) == "cpu:1"
        made = edit(tiny_lm, layers)
        for layer in layers:
            path = tiny_lm.mlp_out_path(layer)
            assert str(made.changes[path].left.device) == f"cpu:{1 + layer // 2}"
            assert torch.equal(made.changes[path].dense().cpu(), alone.changes[path].dense())
        with made.applied(tiny_lm):
            assert scored(tiny_lm) == wanted
            assert complete(tiny_lm, ["The capital"], new_tokens=8, top_k=5) == text
        assert not tiny_lm.applied


@pytest.mark.parametrize("method", ["rome", "emmet"])
def test_other_methods_on_two_devices(tiny_llama: LanguageModel, method: str) -> None:
    alone = edit(tiny_llama, [2], method)
    with pretended_devices():
        spread_over_devices(tiny_llama.network, TWO["llama"])
        made = edit(tiny_llama, [2], method)
        (change,) = made.changes.values()
        assert str(change.left.device) == "cpu:2"
        (wanted,) = alone.changes.values()
        assert torch.equal(change.dense().cpu(), wanted.dense())


@pytest.mark.parametrize("device_map", ["auto", block(0, "cpu")])
def test_a_device_map_is_passed_on(folders: Path, device_map: Any) -> None:
    lm, alone = LanguageModel.load(folders, device_map=device_map), LanguageModel.load(folders)
    made, wanted = edit(lm, [1]), edit(alone, [1])
    assert made.equals(wanted)
    with made.applied(lm), wanted.applied(alone):
        assert scored(lm) == scored(alone)


# --------------------------------------------------------------------------------------- offloaded


def test_blocks_above_the_edited_ones_may_be_on_disk(folders: Path) -> None:
    lm, alone = LanguageModel.load(folders, device_map=block(3)), LanguageModel.load(folders)
    assert weight_out_in(lm.mlp_out(3)).is_meta
    made, wanted = edit(lm, [0, 1]), edit(alone, [0, 1])
    assert made.equals(wanted)
    with made.applied(lm), wanted.applied(alone):
        assert scored(lm) == scored(alone)


def test_an_offloaded_block_is_not_edited(folders: Path) -> None:
    lm, alone = LanguageModel.load(folders, device_map=block(1)), LanguageModel.load(folders)
    made = edit(alone, [0, 1])
    before = weight_out_in(lm.mlp_out(0)).clone()
    refusal = r"layers\.1\.mlp\.down_proj\.weight' of .* was offloaded by the model's device map"
    with pytest.raises(ConfigError, match=refusal):
        edit(lm, [0, 1])
    with pytest.raises(ConfigError, match=refusal):
        made.apply_(lm)
    assert torch.equal(weight_out_in(lm.mlp_out(0)), before) and not lm.applied and not lm.originals
    assert scored(lm) == scored(alone)


def test_moments_above_an_offloaded_block_are_refused(folders: Path) -> None:
    """Their key in the cache is a hash of all weights below."""
    lm = LanguageModel.load(folders, device_map=block(1))
    assert collect(lm, [0], TEXT, tokens=500).layers == (0,)
    with pytest.raises(ConfigError, match="offloaded"):
        collect(lm, [2], TEXT, tokens=500)


def test_an_offloaded_embedding_is_refused_at_once(folders: Path) -> None:
    with pytest.raises(ModelLoadError, match="device map offloads the token embedding"):
        LanguageModel.load(folders, device_map=placed(embed_tokens="disk"))


# ---------------------------------------------------------------------------------- tensor parallel


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A process group of this process alone."""
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_weights_cut_into_parts_are_not_edited(tiny_llama: LanguageModel, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = edit(tiny_llama, [1])
    module = tiny_llama.mlp_out(1)
    module.weight = nn.Parameter(distribute_tensor(weight_out_in(module), mesh, [Shard(1)]))
    refusal = r"layers\.1\.mlp\.down_proj\.weight' of tiny-llama is cut into parts"
    with pytest.raises(ConfigError, match=refusal):
        edit(tiny_llama, [1])
    with pytest.raises(ConfigError, match=refusal):
        whole.apply_(tiny_llama)


PARALLEL = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from errata.errors import ConfigError
from errata.lm.load import LanguageModel
from tests.lm.test_devices import edit, scored

torch.distributed.init_process_group("gloo")
parts = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto")
)
alone = LanguageModel.load(sys.argv[1])
lm = LanguageModel.of(parts, alone.tokenizer)
assert lm.mlp_out(0).weight.to_local().numel() == alone.mlp_out(0).weight.numel() // 2
ours, theirs = scored(lm).column("EM"), scored(alone).column("EM")
assert all(abs(a - b) < 1e-5 for a, b in zip(ours, theirs)), (ours, theirs)
try:
    edit(lm, [1])
except ConfigError as error:
    assert "is cut into parts" in str(error)
    open(f"{sys.argv[1]}/{torch.distributed.get_rank()}.refused", "w").close()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tensor_parallel_model_is_scored_and_not_edited(folders: Path, tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    here = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "--standalone", str(script), str(folders)],
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here / 'src'}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folders.glob("*.refused")} == {"0.refused", "1.refused"}
