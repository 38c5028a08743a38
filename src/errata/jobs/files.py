"""Text files that are whole or not there, checked before a long run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from errata.edits.archive import write_whole
from errata.errors import StorageError


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file in one step, making its folder if needed.

    Raises:
        StorageError: the folder or file cannot be written, or the disk is full.
    """
    path = Path(path)
    make_folder(path.parent)
    write_whole(path, text.encode("utf-8"))
    return path


def make_folder(folder: Path | str) -> Path:
    """Make a folder with its parents.

    Raises:
        StorageError: it cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {folder}: {error.strerror or error}. Name another place."
        ) from error
    return folder


def check_writable(path: Path | str) -> None:
    """Find out before a long run that its result could not be saved.

    Raises:
        StorageError: the folder of `path` cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise StorageError(f"cannot write {path}: it is a folder. Give the name of a file.")
    make_folder(path.parent)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise StorageError(
            f"cannot write to {path.parent}: {error.strerror or error}. Name another place."
        ) from error
