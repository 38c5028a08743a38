"""What can be done with a saved edit: look into it, write it into a model, compare, export."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.edits.diff import LAYER_HEADINGS, diff
from errata.edits.edit import Edit
from errata.edits.file import load_edit
from errata.edits.lora import to_lora
from errata.edits.memory import MemoryEdit
from errata.edits.stack import Stack, weight_changes
from errata.edits.weights import WeightEdit
from errata.errors import ConfigError, ModelLoadError, StorageError
from errata.jobs.files import make_folder
from errata.jobs.models import Model, as_model
from errata.jobs.record import Change
from errata.lm.load import LanguageModel
from errata.lm.weights import weight_out_in
from errata.progress import Progress, silent


@dataclass(frozen=True)
class MemoryPart:
    """What an edit holds beside the weights, at one place."""

    path: str
    kind: str
    entries: int
    nbytes: int


@dataclass(frozen=True)
class Description:
    """What is in an edit file."""

    edit: Edit
    changes: tuple[Change, ...]
    memories: tuple[MemoryPart, ...]
    file_bytes: int


@dataclass(frozen=True)
class Comparison:
    """How two edits differ."""

    shared: int
    """How many facts are in both."""
    facts: Sequence[tuple[str, ...]]
    """(where, prompt, target) of those that are not."""
    headings: tuple[str, ...]
    """Of the layers' columns."""
    layers: Sequence[tuple[str, ...]]


def describe(path: Path | str) -> Description:
    """Look into an edit file; no model is needed.

    Raises:
        EditFileError: it is no edit file, or was cut short or altered.
    """
    edit = load_edit(path)
    memories = tuple(
        MemoryPart(part.path, part.kind, len(part.serves), part.nbytes)
        for part in edit.parts
        if isinstance(part, MemoryEdit)
    )
    return Description(edit, changes_of(edit), memories, Path(path).stat().st_size)


def changes_of(edit: Edit, lm: LanguageModel | None = None) -> tuple[Change, ...]:
    """How much each weight is changed, as a share of the weight if the model is at hand."""
    return tuple(
        Change(
            path=path,
            norm=change.norm(),
            rank=change.rank,
            weight_norm=float(weight_out_in(lm.module(path)).float().norm()) if lm else None,
        )
        for path, change in weight_changes(edit).items()
    )


def load_all(files: Sequence[Path | str]) -> Edit:
    """One edit file, or several as a stack in order.

    Raises:
        EditFileError: one of them is no edit file.
    """
    edits = [load_edit(file) for file in files]
    return edits[0] if len(edits) == 1 else Stack(edits)


def compare(a: Path | str, b: Path | str) -> Comparison:
    """How two edit files differ, as tables.

    Raises:
        EditFileError: one of them is no edit file.
        WrongModelError: they are for models of different shapes.
    """
    found = diff(load_edit(a), load_edit(b))
    return Comparison(len(found.shared), found.fact_rows(), LAYER_HEADINGS, found.layer_rows())


def apply(
    model: Model,
    files: Sequence[Path | str],
    out: Path | str,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write a complete model folder with the edits in its weights.

    The folder is written aside and renamed, so that it is whole or not there.

    Args:
        model: the model that the edits were made for, or its name.
        files: edit files, applied in order.
        out: the new folder; it must not exist, or be empty.
        force: apply even to another model than the edits were made for.
        progress: called with (stage, done, total).

    Raises:
        EditFileError: a file is no edit.
        StorageError: the folder is not empty or cannot be written.
        WrongModelError: an edit was made for another model.
        ConfigError: an edit lies beside the weights, where a folder of weights cannot hold it.
    """
    out = Path(out)
    edit = load_all(files)
    for part in edit.parts:
        if not isinstance(part, WeightEdit):
            raise ConfigError(
                f"{part} lies beside the model's weights and changes none, so a folder of weights "
                "cannot hold it. Keep its file and apply it to the model when you load it."
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} exists already. Name a new folder, so that nothing is lost.")
    make_folder(out.parent)
    progress("loading the model", 0, 3)
    lm = as_model(model)
    progress("writing the model", 1, 3)
    with edit.applied(lm, force=force):
        try:
            aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        except OSError as error:
            raise StorageError(f"cannot write to {out.parent}: {error.strerror}.") from error
        try:
            lm.network.save_pretrained(aside)
            lm.tokenizer.save_pretrained(aside)
            progress("writing the model", 2, 3)
            if out.exists():
                out.rmdir()
            aside.chmod(0o755)
            aside.rename(out)
        except OSError as error:
            raise StorageError(
                f"cannot write the model to {out}: {error}. Nothing was left there."
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    progress("writing the model", 3, 3)
    return out


def lora(model: Model | None, files: Sequence[Path | str], out: Path | str) -> Path:
    """Write the edits as a PEFT LoRA adapter.

    Args:
        model: the model that they were made for; by default the one that the edit names.
        files: edit files, summed.
        out: the adapter's folder.

    Raises:
        EditFileError: a file is no edit.
        ModelLoadError: no model was given and the edit does not name one.
        WrongModelError: an edit was made for another model.
    """
    edit = load_all(files)
    to_lora(edit, as_model(model_for(edit, model)), out)
    return Path(out)


def model_for(edit: Edit, model: Model | None) -> Model:
    """The model that was given, or else the one that the edit's record names.

    Raises:
        ModelLoadError: there is neither.
    """
    chosen = model or edit.record.model
    if not chosen:
        raise ModelLoadError("the edit does not say which model it is for; name it with -m.")
    return chosen
