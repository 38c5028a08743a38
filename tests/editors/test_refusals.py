"""Methods that continue a prompt refuse models that do not."""

from __future__ import annotations

import pytest

from errata.editors import EDITORS
from errata.editors.background import Background
from errata.editors.closed_form.closed_form import ClosedForm
from errata.errors import ConfigError
from errata.measure.drift import observe
from errata.requests import Request
from tests.lm.families import tiny_lm

CLOSED_FORM = [name for name in EDITORS if issubclass(EDITORS[name].editor, ClosedForm)]


@pytest.mark.parametrize("variant", ["bert", "bert-labels", "t5"])
@pytest.mark.parametrize("method", CLOSED_FORM)
def test_closed_form_editors_need_a_decoder(method: str, variant: str) -> None:
    lm = tiny_lm(variant)
    entry = EDITORS[method]
    editor = entry.editor(entry.config.from_dict({"layers": [1]}), Background(["Some text."]))
    told = f"^{method.upper()} needs a decoder; tiny-{variant} is an encoder"
    request = Request("The capital of {} is", "France", "Rome")
    with pytest.raises(ConfigError, match=told):
        editor.edit(lm, [request])
    with pytest.raises(ConfigError, match=told):
        list(editor.edit_each(lm, [[request]]))
    with pytest.raises(ConfigError, match="second moment of old keys needs a decoder"):
        editor.background.moments(lm, [1])


@pytest.mark.parametrize("variant", ["bert", "t5"])
def test_drift_needs_a_decoder(variant: str) -> None:
    with pytest.raises(ConfigError, match="^drift needs a decoder"):
        observe(tiny_lm(variant), ["Paris is in"], [])
