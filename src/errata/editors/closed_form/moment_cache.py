"""Where second moments are kept between runs, and the sums of a pass that was killed."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from errata.algebra.moments import SecondMoment
from errata.editors.closed_form.moments import Moments, read_tensors, write_tensors
from errata.errors import MomentError, StorageError

logger = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600.0


def cache_folder() -> Path:
    """Where the user's caches are: $ERRATA_CACHE, or the platform's own place. Not made here."""
    if chosen := os.environ.get("ERRATA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "errata"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "errata"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "errata"


class MomentCache:
    """The cache folder: one file for each layer's moment, one for the sums of a pass under way.

    Files are written aside and renamed, so that a reader, another process and a later run see
    whole ones only. A folder that cannot be written to is told once, and done without.
    """

    def __init__(self, cache: Path | None) -> None:
        """Keep moments in a folder, or nothing."""
        self.folder = None if cache is None else cache / "moments"
        self._partial: Path | None = None

    def load(self, key: str, width: int) -> Moments | None:
        """The moment under `key`, if it is there and whole."""
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            moments = Moments.load(path)
            if moments.key == key and all(len(mean) == width for mean in moments.means.values()):
                return moments
            reason = "it is of something else"
        except MomentError as error:
            reason = str(error)
        logger.warning("a cached moment is not usable and is computed again: %s", reason)
        return None

    def save(self, moments: Moments) -> None:
        """Keep one layer's moment."""
        if path := self._path(moments.key):
            self._try(lambda: moments.save(path))

    def load_partial(
        self, key: str, devices: Mapping[int, torch.device]
    ) -> tuple[dict[int, SecondMoment], int] | None:
        """The sums of a pass that was killed, and how many documents they were taken over."""
        self._partial = self._path(key + ".partial")
        if self._partial is None or not self._partial.exists():
            return None
        try:
            tensors, notes = read_tensors(self._partial)
            sums = {
                layer: SecondMoment.from_state(
                    {name: tensors[f"{layer}.{name}"] for name in ("sum", "count")}, device
                )
                for layer, device in devices.items()
            }
            position = int(notes["documents"])
        except (MomentError, KeyError, ValueError) as error:
            logger.warning("a partial moment is not usable; the pass begins anew: %s", error)
            return None
        logger.info("the pass goes on after %d documents.", position)
        return sums, position

    def save_partial(self, key: str, sums: Mapping[int, SecondMoment], position: int) -> None:
        """Keep the sums of a pass under way."""
        tensors: dict[str, Tensor] = {}
        for layer, moment in sums.items():
            state = moment.state_dict()
            tensors |= {f"{layer}.{name}": tensor for name, tensor in state.items()}
        if path := self._path(key + ".partial"):
            self._try(lambda: write_tensors(path, tensors, {"documents": str(position)}))

    def forget_partial(self) -> None:
        """The pass is over: its sums are of no more use."""
        if self._partial is not None:
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def _try(self, write: Callable[[], None]) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.tmp"):  # of processes that were killed
                with suppress(OSError):  # another process may clear up as well
                    if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                        left.unlink()
            write()
        except (OSError, StorageError) as error:
            logger.warning(
                "moments cannot be kept in %s and will be computed again next time: %s\n"
                "  Set ERRATA_CACHE to a folder that can be written to.",
                self.folder,
                error,
            )
            self.folder = None
