"""How edits lie on disk: one safetensors file, tensors and JSON metadata under one checksum.

The metadata's keys are `format`, `version`, `kind`, `fields` (JSON: requests, record, base ...)
and `checksum`, a SHA-256 over all the others and over each tensor's name, dtype, shape and bytes.
Nothing is pickled. Files are written aside, synchronised, and renamed, so that there is either
the whole new file or what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from errata.algebra.precision import is_finite
from errata.errors import EditFileError, NotFiniteError, StorageError

FORMAT = "errata-edit"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class Contents:
    """What an edit file holds."""

    kind: str
    """Which sort of edit, a key of `errata.edits.file.KINDS`."""
    fields: Mapping[str, Any]
    """All that is not a tensor; JSON values."""
    tensors: Mapping[str, Tensor]


def write(path: Path | str, contents: Contents) -> None:
    """Write an edit file, whole or not at all.

    Raises:
        NotFiniteError: a tensor holds NaN or infinity (perhaps only in the dtype it is saved in).
        StorageError: the file cannot be written.
    """
    for name, tensor in contents.tensors.items():
        if not is_finite(tensor):
            raise NotFiniteError(
                f"{name} holds NaN or infinity as {tensor.dtype}; {path} is not written."
            )
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in contents.tensors.items()
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": contents.kind,
        "fields": json.dumps(contents.fields, ensure_ascii=False),
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    write_whole(path, *_ordered(safetensors.torch.save(tensors, metadata)))


def read(path: Path | str) -> Contents:
    """Read an edit file and verify every byte of it.

    Tensors stay in the file, mapped, until they are looked at: memories of many edits may be larger
    than the machine's own memory, of which a prompt needs one or two.

    Raises:
        EditFileError: there is no such file, it is no edit file or one of another format, or it
            was cut short or altered.
    """
    try:
        header = _header(Path(path))
        tensors = safetensors.torch.load_file(path)
    except OSError as error:
        raise EditFileError(f"cannot read the edit file {path}: {error.strerror}.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise EditFileError(
            f"{path} is not a whole safetensors file: it was cut short or altered, or is "
            f"something else ({error}). Get it again, or make the edit anew."
        ) from error
    metadata: dict[str, str] = header.get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise EditFileError(f"{path} is a safetensors file, but not an edit that errata saved.")
    if (version := metadata.get("version")) != VERSION:
        raise EditFileError(
            f"{path} has format version {version}; this errata reads version {VERSION}. "
            "Read it with the errata that wrote it, or make the edit anew."
        )
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(metadata, tensors):
        raise EditFileError(
            f"{path} was altered after it was saved: its contents do not match its checksum. "
            "Get it again, or make the edit anew."
        )
    return Contents(metadata.get("kind", ""), json.loads(metadata["fields"]), tensors)


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself.

    Raises:
        ValueError: it is none.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def digest(contents: Contents) -> str:
    """SHA-256 over all that a file would hold; hexadecimal."""
    told = {"kind": contents.kind, "fields": json.dumps(contents.fields, sort_keys=True)}
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in contents.tensors.items()
    }
    return _checksum(told, tensors)


def _ordered(data: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file in two parts, its metadata sorted: the library's order is random.

    So that equal contents give equal files, to the byte.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text, memoryview(data)[8 + size :]


def write_whole(path: Path | str, *parts: bytes | memoryview) -> None:
    """Put some bytes at `path`, one part after another, whole or not at all.

    Raises:
        StorageError: the file cannot be written; what was there before is still there.
    """
    path = Path(path)
    try:
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with aside.open("xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()  # gone already where the rename was reached
    except (OSError, ValueError) as error:  # ValueError: no name to write to
        why = getattr(error, "strerror", None) or error
        raise StorageError(
            f"cannot write {path} ({sum(map(len, parts)) / 1e6:.1f} MB): {why}. Nothing was "
            "changed. Free space or name another place."
        ) from error


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
