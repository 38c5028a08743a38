"""How a change is computed: one file per method, all listed here."""

from __future__ import annotations

from dataclasses import dataclass

from errata.editors.background import Background
from errata.editors.closed_form.closed_form import ClosedForm
from errata.editors.closed_form.config import ClosedFormConfig
from errata.editors.closed_form.emmet import Emmet, EmmetConfig
from errata.editors.closed_form.memit import Memit, MemitConfig
from errata.editors.closed_form.rome import Rome, RomeConfig
from errata.editors.editor import Config, Editor

__all__ = ["EDITORS", "Background", "Config", "Editor", "Method"]


@dataclass(frozen=True)
class Method:
    """One line of the table of methods."""

    editor: type[ClosedForm]
    config: type[ClosedFormConfig]
    title: str
    paper: str


EDITORS: dict[str, Method] = {
    "rome": Method(Rome, RomeConfig, "one fact as a rank-one change", "arXiv:2202.05262"),
    "memit": Method(
        Memit, MemitConfig, "many facts over several layers, least squares", "arXiv:2210.07229"
    ),
    "emmet": Method(
        Emmet, EmmetConfig, "many facts at once, equality constraint", "arXiv:2403.14236"
    ),
}
"""Name on the command line -> editor, config, paper: the one line that a new method adds."""
