"""Edit files: exact round trips, whole or absent, nothing damaged is believed."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from errata.edits import archive
from errata.edits.edit import Record, as_json
from errata.edits.file import load_edit
from errata.edits.stack import Stack
from errata.edits.weights import WeightEdit
from errata.errors import EditFileError, NotFiniteError, StorageError, WrongModelError
from errata.lm.load import LanguageModel
from errata.requests import Request
from tests.edits.making import make_edit, same_bits, weights


def loaded(path: Path) -> WeightEdit:
    edit = load_edit(path)
    assert isinstance(edit, WeightEdit)
    return edit


def test_a_loaded_edit_makes_the_same_model_to_the_bit(
    any_lm: LanguageModel, tmp_path: Path
) -> None:
    edit = make_edit(any_lm, dtype=torch.float64)  # saved in float32 all the same
    edit.save(tmp_path / "e.safetensors")
    with edit.applied(any_lm):
        wanted = weights(any_lm)
    with load_edit(tmp_path / "e.safetensors").applied(any_lm):
        assert same_bits(weights(any_lm), wanted)


def test_all_that_is_known_comes_back(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    edit = make_edit(tiny_lm, subject="Zürich {} 🗺").with_scores({"ES": 99.5, "S": float("nan")})
    edit.save(tmp_path / "e.safetensors")
    again = loaded(tmp_path / "e.safetensors")
    assert again.requests == edit.requests
    assert again.base == edit.base and list(again.changes) == list(edit.changes)
    assert again.record == edit.record
    record = again.record
    assert (record.method, record.config, record.seed) == ("random", {"size": 0.1}, 0)
    assert (record.model, record.dtype) == (tiny_lm.name, "float32")
    assert record.scores == {"ES": 99.5, "S": None}
    assert set(record.versions) == {"errata", "torch", "transformers"}
    assert record.created.endswith("+00:00")


def test_float64_can_be_kept(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    edit = make_edit(tiny_lm)
    edit.save(tmp_path / "e.safetensors", dtype=torch.float64)
    path = tiny_lm.mlp_out_path(1)
    assert torch.equal(
        loaded(tmp_path / "e.safetensors").changes[path].left, edit.changes[path].left
    )


def test_the_file_is_plain_safetensors_with_json(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    make_edit(tiny_lm).save(tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert f"{tiny_lm.mlp_out_path(1)}.left" in file.keys()  # noqa: SIM118  # no mapping
    assert metadata["format"] == "errata-edit" and metadata["version"] == "1"
    assert json.loads(metadata["fields"])["requests"][0]["target"] == "Rome"


def test_ten_facts_of_the_pocket_shape_are_small(tmp_path: Path) -> None:
    from errata.algebra.low_rank import LowRank

    changes = {
        f"layer.{layer}": LowRank(torch.randn(256, 10), torch.randn(10, 1024)) for layer in range(3)
    }
    requests = tuple(Request("The capital of {} is", f"Land {k}", "Rome") for k in range(10))
    WeightEdit(changes, dict.fromkeys(changes, "0" * 64), requests).save(tmp_path / "e.safetensors")
    assert (tmp_path / "e.safetensors").stat().st_size < 200_000


def test_saving_replaces_what_was_there(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    path.write_text("old")
    make_edit(tiny_lm).save(path)
    assert loaded(path).requests
    assert os.listdir(tmp_path) == ["e.safetensors"]


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, -1000])
def test_cut_short(tiny_lm: LanguageModel, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "e.safetensors"
    make_edit(tiny_lm).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(EditFileError, match="cut short or altered"):
        load_edit(path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_altered_byte_is_noticed(
    tiny_gpt2: LanguageModel, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "e.safetensors"
    edit = make_edit(tiny_gpt2, layers=(1,))
    edit.save(path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    last = data.draw(st.sampled_from([header, len(content)])) - 1  # half of them in the header
    where = data.draw(st.integers(0, last))
    content[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        again = loaded(path)
    except EditFileError:
        return
    assert again.equals(edit) and again.record == edit.record  # blanks between JSON's signs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "7"}, "has format version 7; this errata reads version 1"),
        ({"format": "pt"}, "not an edit that errata saved"),
        ({"fields": "{}"}, "was altered"),
        ({"checksum": "0"}, "was altered"),
    ],
)
def test_altered_metadata(
    tiny_lm: LanguageModel, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    path = tmp_path / "e.safetensors"
    make_edit(tiny_lm).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata | change)
    with pytest.raises(EditFileError, match=message):
        load_edit(path)


def test_an_unknown_kind(tmp_path: Path) -> None:
    archive.write(tmp_path / "e.safetensors", archive.Contents("dream", {}, {"x": torch.ones(1)}))
    with pytest.raises(
        EditFileError, match=r"'dream' is unknown; this errata reads \['memory', 'stack"
    ):
        load_edit(tmp_path / "e.safetensors")


@pytest.mark.parametrize("fields", [{}, {"base": {"a": ""}, "requests": [], "record": {}}, []])
def test_parts_that_do_not_fit(tmp_path: Path, fields: dict[str, object]) -> None:
    archive.write(tmp_path / "e", archive.Contents("weight", fields, {"a.left": torch.ones(2, 2)}))
    with pytest.raises(EditFileError, match="do not fit together"):
        load_edit(tmp_path / "e")


def test_a_record_of_the_future(tmp_path: Path) -> None:
    fields = {"base": {}, "requests": [], "record": {"aura": 1}}
    archive.write(tmp_path / "e", archive.Contents("weight", fields, {"x": torch.ones(1)}))
    with pytest.raises(EditFileError, match="aura"):
        load_edit(tmp_path / "e")


def test_what_is_no_edit_file(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match="No such file"):
        load_edit(tmp_path / "missing.safetensors")
    with pytest.raises(EditFileError, match="directory"):
        load_edit(tmp_path)
    torch.save({"x": torch.ones(2)}, tmp_path / "pickle.pt")
    (tmp_path / "text").write_text("not an edit at all, but long enough to hold a header\n" * 9)
    for name in ("pickle.pt", "text"):
        with pytest.raises(EditFileError, match="not a whole safetensors file"):
            load_edit(tmp_path / name)
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EditFileError, match="not an edit that errata saved"):
        load_edit(tmp_path / "model.safetensors")


def test_a_file_for_another_model(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    make_edit(tiny_gpt2).save(tmp_path / "e.safetensors")
    with pytest.raises(WrongModelError, match="was made for 'tiny-gpt2'"):
        load_edit(tmp_path / "e.safetensors").apply_(tiny_llama)


def test_no_folder_to_write_to(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "missing" / "e", tmp_path / "file" / "e", tmp_path, Path("/")):
        with pytest.raises(StorageError, match="cannot write"):
            make_edit(tiny_lm).save(place)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_to_write(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        make_edit(tiny_lm).save(tmp_path / "e")


def test_a_full_disk_leaves_the_old_file(
    tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_edit(tiny_lm, 0).save(tmp_path / "e")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left[\s\S]*Nothing was changed"):
        make_edit(tiny_lm, 1).save(tmp_path / "e")
    assert os.listdir(tmp_path) == ["e"]
    assert loaded(tmp_path / "e").equals(make_edit(tiny_lm, 0))


def test_a_file_size_limit_leaves_nothing(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    """The kernel's own refusal, after a part was written."""
    edit, limits = make_edit(tiny_lm), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            edit.save(tmp_path / "e")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_nan_is_not_saved(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    edit = make_edit(tiny_lm)
    edit.changes[tiny_lm.mlp_out_path(1)].left[0, 0] = 1e300  # finite until it is float32
    with pytest.raises(NotFiniteError, match=r"left holds NaN or infinity as torch.float32"):
        edit.save(tmp_path / "e")
    assert not os.listdir(tmp_path)


def test_stacks_are_saved_whole(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    stack = Stack([make_edit(tiny_lm, 0), make_edit(tiny_lm, 1)]).with_scores({"S": 1})
    stack.save(tmp_path / "s")
    again = load_edit(tmp_path / "s")
    assert isinstance(again, Stack) and again.record == stack.record
    with stack.applied(tiny_lm):
        wanted = weights(tiny_lm)
    with again.applied(tiny_lm):
        assert same_bits(weights(tiny_lm), wanted)


def test_an_empty_stack_is_saved(tmp_path: Path) -> None:
    Stack([]).save(tmp_path / "s")
    assert load_edit(tmp_path / "s").requests == ()


def test_as_json() -> None:
    value = {
        "a": (1, torch.tensor(2.0)),
        3: {torch.float32},
        "r": Record(seed=4),
        "n": [None, True],
    }
    assert as_json(value) | {"r": ""} == {
        "a": [1, 2.0], "3": ["torch.float32"], "r": "", "n": [None, True],
    }  # fmt: skip
    assert as_json([float("inf"), torch.tensor(float("nan"))]) == [None, None]
