"""Second moments of keys: in memory, with their factors, and in files of their own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata.algebra import memorize
from errata.editors.closed_form.fingerprints import hash_of
from errata.errors import MomentError, NotFiniteError, SolveError, StorageError
from errata.lm.weights import weight_hash

FORMAT = "errata-moments-1"
"""What files of moments call themselves."""


@dataclass(eq=False)
class Moments:
    """The second moments of some layers, and their Cholesky factors once they are wanted."""

    means: Mapping[int, Tensor]
    """Layer -> (d_ff, d_ff) E[k k^T], symmetric."""

    tokens: int
    """How many tokens they were taken over; 0 where nobody said."""

    key: str
    """Hash of what they were made from; equal keys, equal moments."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where factors are computed and kept, unless `factor` is told."""

    _factors: dict[int, memorize.Factor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        means: Mapping[int, Tensor],
        *,
        tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Moments that are there already, e.g. published ones.

        Raises:
            MomentError: one is not a square matrix.
        """
        for layer, mean in means.items():
            if mean.ndim != 2 or mean.shape[0] != mean.shape[1]:
                raise MomentError(
                    f"the moment of block {layer} must be a square matrix, got shape "
                    f"{tuple(mean.shape)}."
                )
        hashes = {layer: weight_hash(mean) for layer, mean in means.items()}
        return cls(dict(means), tokens, hash_of(hashes), torch.device(device))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a moment, ascending."""
        return tuple(sorted(self.means))

    def mean(self, layer: int) -> Tensor:
        """E[k k^T] of a layer, (d_ff, d_ff).

        Raises:
            MomentError: the layer has none.
        """
        if layer not in self.means:
            raise MomentError(
                f"there is no moment for block {layer}, only for {list(self.layers)}. Collect it "
                "too, or edit one of these."
            )
        return self.means[layer]

    def factor(self, layer: int, device: torch.device | None = None) -> memorize.Factor:
        """The Cholesky factor of a layer's moment; computed once, d_ff^3 / 3, then reused.

        Args:
            layer: which.
            device: where it is wanted: that of the layer's weight, in a model on several devices.

        Raises:
            MomentError: the layer has no moment.
            SolveError: the moment is singular.
            NotFiniteError: the moment holds NaN or infinity.
        """
        if layer not in self._factors:
            mean = self.mean(layer).to(device or self.device)
            try:
                self._factors[layer] = memorize.factor(mean)
            except (SolveError, NotFiniteError) as error:
                told = f"block {layer}" + (f" ({self.tokens} tokens)" if self.tokens else "")
                raise type(error)(f"{told}: {error}") from error
        return self._factors[layer]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        tensors = {str(layer): self.means[layer] for layer in self.layers}
        write_tensors(Path(path), tensors, {"tokens": str(self.tokens), "key": self.key})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote.

        Raises:
            MomentError: there is no such file, or it is cut short, altered or of another kind.
        """
        tensors, notes = read_tensors(Path(path))
        try:
            means = {int(name): tensor for name, tensor in tensors.items()}
            return cls(means, int(notes["tokens"]), notes["key"], torch.device(device))
        except (KeyError, ValueError) as error:
            raise MomentError(f"{path} is not a file of second moments.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a file aside, then rename it into place."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "checksum": _checksum(kept), **notes}
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(kept, aside, metadata=metadata)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot write {path}: {error}. Check the folder, the permission and the free space."
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a file that `write_tensors` wrote, checked."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MomentError(f"cannot read {path}: {error}. It is missing or cut short.") from error
    if notes.get("format") != FORMAT:
        raise MomentError(f"{path} is not a file of second moments ({FORMAT}).")
    if notes.get("checksum") != _checksum(tensors):
        raise MomentError(f"{path} was altered after it was written: its checksum does not fit.")
    return tensors, notes


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return hash_of({name: weight_hash(tensor) for name, tensor in tensors.items()})
