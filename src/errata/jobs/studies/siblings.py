"""Which databases of results this user has, so that no study computes what another has finished.

`$ERRATA_CACHE/studies` holds a small file for each, named by the hash of the path that it tells.
There is no second copy of any result: a database that is deleted takes its results with it.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from pathlib import Path

from errata.editors.closed_form.moment_cache import cache_folder
from errata.errors import StorageError
from errata.jobs.files import write_text

logger = logging.getLogger(__name__)


def enlist(path: Path) -> None:
    """Let other studies find this database; without a cache folder they do not, says a warning."""
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    entry = _folder() / f"{name}.txt"
    if not entry.exists():
        try:
            write_text(entry, str(path))
        except (StorageError, UnicodeEncodeError) as error:
            logger.warning("other studies will not find these results: %s", error)


def siblings(path: Path) -> list[Path]:
    """The other databases that are still there; entries of those that are not are struck out."""
    found = []
    for entry in sorted(_folder().glob("*.txt")):
        with suppress(OSError):  # struck out by another process just now
            other = Path(entry.read_text(encoding="utf-8"))
            if not other.is_file():
                entry.unlink()
            elif other != path:
                found.append(other)
    return found


def _folder() -> Path:
    return cache_folder() / "studies"
