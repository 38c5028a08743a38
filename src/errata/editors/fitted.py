"""Reading fitted editors back; saving is `Fitted.save`."""

from __future__ import annotations

from pathlib import Path

from errata.editors import EDITORS, Background
from errata.editors.trainable import FITTED, Fit, Fitted, Trainable
from errata.edits.archive import read
from errata.errors import ConfigError, EditFileError
from errata.lm.load import LanguageModel


def load_editor(path: Path | str, lm: LanguageModel) -> Fitted:
    """Read a fitted editor of any method, for the model that it was fitted to.

    Raises:
        EditFileError: there is no such file, it is no fitted editor, or it was cut short or
            altered.
        WrongModelError: it was fitted to another model.
    """
    contents = read(path)
    if contents.kind != FITTED:
        raise EditFileError(
            f"{path} holds no fitted editor but something else that errata saved (of kind "
            f"{contents.kind!r}); make an editor with `errata fit`."
        )
    name = contents.fields.get("method")
    method = EDITORS.get(str(name))
    if method is None or not issubclass(method.editor, Trainable):
        raise EditFileError(
            f"{path} holds an editor of the method {name!r}, which this errata does not know how "
            "to fit; another errata may have written it. Fit the editor anew."
        )
    try:
        unfitted = method.editor(method.config.from_dict(contents.fields["config"]), Background())
        editor = unfitted.restored(Fit(**contents.fields["fit"]), contents.tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise EditFileError(
            f"{path} is a fitted editor with parts that do not fit together ({error!r}); another "
            "errata may have written it. Fit the editor anew."
        ) from error
    editor.check(lm)
    return editor
