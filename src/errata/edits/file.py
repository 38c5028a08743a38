"""Reading edit files back. Saving is `Edit.save`; the format is in `errata.edits.archive`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from errata.edits.archive import Contents, read
from errata.edits.edit import Edit, Record
from errata.edits.memory import MemoryEdit
from errata.edits.stack import Stack
from errata.edits.weights import WeightEdit
from errata.errors import EditFileError, RequestError


def load_edit(path: Path | str) -> Edit:
    """Read an edit of any kind; applying it then checks that it meets its own model.

    Raises:
        EditFileError: there is no such file, it is no edit file or one of another format or kind,
            or it was cut short or altered.
    """
    try:
        edit = _edit(read(path))
        for part in edit.parts:
            if isinstance(part, MemoryEdit) and part.shared is not None:
                part.shared.folder = Path(path).parent
        return edit
    except (KeyError, TypeError, ValueError, AttributeError, RequestError) as error:
        raise EditFileError(
            f"{path} is an edit file with parts that do not fit together ({error!r}); another "
            "errata may have written it. Make the edit anew."
        ) from error


def _edit(contents: Contents) -> Edit:
    if contents.kind not in KINDS:
        raise EditFileError(
            f"an edit of kind {contents.kind!r} is unknown; this errata reads {sorted(KINDS)}."
        )
    return KINDS[contents.kind](contents)


def _stack(contents: Contents) -> Stack:
    tensors: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in contents.tensors.items():
        number, _, own_name = name.partition(":")
        tensors[number][own_name] = tensor
    edits = [
        _edit(Contents(part["kind"], part["fields"], tensors[str(k)]))
        for k, part in enumerate(contents.fields["parts"])
    ]
    return Stack(edits, Record.from_dict(contents.fields["record"]))


KINDS: dict[str, Callable[[Contents], Edit]] = {  # the kind in a file -> who builds the edit
    "weight": WeightEdit.from_contents,
    "memory": MemoryEdit.from_contents,
    "stack": _stack,
}
