"""What all edits of a memory need and none of their files holds: a file of its own beside them.

An edit names it by its digest. It is in memory once, however many edits refer to it, and once in
each folder in which such edits are saved: a stream of n edits does not hold it n times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from errata.edits.archive import Contents, digest, read, write
from errata.errors import EditFileError


class Shared:
    """The shared part, or where to read it when it is first needed."""

    def __init__(
        self, name: str, contents: Contents | None = None, folder: Path | None = None
    ) -> None:
        """Name it.

        Args:
            name: its digest; of `of` where the contents are at hand.
            contents: what it is.
            folder: where its file is, if there are no contents yet.
        """
        self.name = name
        self.folder = folder
        self._contents = contents
        self._built: Any = None

    @classmethod
    def of(cls, contents: Contents) -> Self:
        """From what it is."""
        return cls(digest(contents), contents)

    @property
    def file(self) -> str:
        """What its file is called."""
        return f"shared-{self.name[:16]}.safetensors"

    def contents(self) -> Contents:
        """What it is; read once.

        Raises:
            EditFileError: its file is missing, cut short, altered or another's.
        """
        if self._contents is None:
            if self.folder is None or not (self.folder / self.file).is_file():
                where = f"in {self.folder}" if self.folder else "anywhere"
                raise EditFileError(
                    f"the edit needs {self.file}, which was saved beside it and is not {where}. "
                    "Put it there, or make the edit anew."
                )
            found = read(self.folder / self.file)
            if digest(found) != self.name:
                raise EditFileError(
                    f"{self.folder / self.file} is not what the edit beside it was made with. "
                    "Get the file again, or make the edit anew."
                )
            self._contents = found
        return self._contents

    def once(self, build: Callable[[Contents], Any]) -> Any:
        """What `build` makes of it, made once."""
        if self._built is None:
            self._built = build(self.contents())
        return self._built

    def write_into(self, folder: Path) -> None:
        """Write its file into a folder that has none.

        Raises:
            StorageError: it cannot be written.
        """
        if not (folder / self.file).exists():
            write(folder / self.file, self.contents())
