"""What can be done with saved edits: describe, apply for good, export, compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata.errors import EditFileError, ModelLoadError, StorageError, WrongModelError
from errata.jobs import ship
from errata.jobs.ask import ask
from errata.lm.load import LanguageModel


def test_a_description_needs_no_model(edit_files: tuple[Path, Path]) -> None:
    found = ship.describe(edit_files[0])
    assert [request.subject for request in found.edit.requests] == ["France", "Italy"]
    assert [change.rank for change in found.changes] == [2, 2]
    assert found.file_bytes == edit_files[0].stat().st_size


def test_an_applied_folder_says_the_new_facts(
    edit_files: tuple[Path, Path], trained_folder: Path, tmp_path: Path
) -> None:
    lm = LanguageModel.load(trained_folder)
    out = ship.apply(lm, edit_files, tmp_path / "edited")
    assert lm.applied == []
    prompts = ["The capital of France is", "The capital of Peru is"]
    written = ask(out, prompts, new_tokens=4)
    stacked = ask(lm, prompts, ship.load_all(edit_files), new_tokens=4)
    assert [answer.before for answer in written] == [answer.after for answer in stacked]
    assert written[0].before.strip().startswith("Rome")
    assert not written[1].before.strip().startswith("Lima")
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]  # nothing left aside


def test_lora_gives_the_same_logits(
    edit_files: tuple[Path, Path], trained_folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    lm = LanguageModel.load(trained_folder)
    ids = lm.tokenizer("The capital of France is", return_tensors="pt")
    edit = ship.load_all(edit_files)
    with edit.applied(lm), torch.no_grad():
        wanted = lm.network(**ids).logits
    ship.lora(lm, edit_files, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(lm.network, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted(**ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_nothing_is_overwritten(
    edit_files: tuple[Path, Path], trained_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(StorageError, match="exists"):
        ship.apply(trained_folder, edit_files, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_another_model_is_refused(
    edit_files: tuple[Path, Path], tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(WrongModelError):
        ship.apply(tiny_gpt2, edit_files, tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


def test_a_cut_file_is_refused(edit_files: tuple[Path, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(edit_files[0].read_bytes()[:-40])
    with pytest.raises(EditFileError, match="cut"):
        ship.describe(cut)


def test_a_comparison_names_facts_and_weights(edit_files: tuple[Path, Path]) -> None:
    found = ship.compare(*edit_files)
    assert found.shared == 0
    assert [row[0] for row in found.facts] == ["only a", "only a", "only b"]
    assert len(found.layers) == 2 and all(len(row) == len(found.headings) for row in found.layers)


def test_the_edit_names_its_model(edit_files: tuple[Path, Path], trained_folder: Path) -> None:
    edit = ship.load_all(edit_files[:1])
    assert ship.model_for(edit, None) == str(trained_folder)
    assert ship.model_for(edit, "other") == "other"
    with pytest.raises(ModelLoadError, match="-m"):
        ship.model_for(ship.load_all([]), None)
