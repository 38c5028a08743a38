"""How a change is computed: one file per method, all listed here."""

from __future__ import annotations

from dataclasses import dataclass

from errata.editors.background import Background
from errata.editors.closed_form.emmet import Emmet, EmmetConfig
from errata.editors.closed_form.memit import Memit, MemitConfig
from errata.editors.closed_form.rome import Rome, RomeConfig
from errata.editors.config import Config, EditorConfig
from errata.editors.editor import Editor
from errata.editors.hypernet.enn import Enn, EnnConfig
from errata.editors.hypernet.ke import Ke, KeConfig
from errata.editors.hypernet.mend import Mend, MendConfig
from errata.editors.hypernet.salem import Salem, SalemConfig
from errata.editors.memory.grace import Grace, GraceConfig
from errata.editors.memory.scen import Scen, ScenConfig
from errata.editors.memory.serac import Serac, SeracConfig
from errata.editors.memory.t_patcher import TPatcher, TPatcherConfig
from errata.editors.tuning.finetune import (
    FineTune,
    FineTuneConfig,
    FineTuneKL,
    FineTuneKLConfig,
    FineTuneLimited,
    FineTuneLimitedConfig,
)
from errata.editors.tuning.neurons import KnowledgeNeurons, KnowledgeNeuronsConfig
from errata.lm.anatomy import Kind

__all__ = ["EDITORS", "Background", "Config", "Editor", "EditorConfig", "Method"]

_ALL: tuple[Kind, ...] = ("decoder", "encoder", "encoder-decoder")


@dataclass(frozen=True)
class Method:
    """One line of the table of methods."""

    editor: type[Editor]
    config: type[EditorConfig]
    title: str
    paper: str
    kinds: tuple[Kind, ...] = ("decoder",)
    """What models it edits."""


EDITORS: dict[str, Method] = {
    "rome": Method(Rome, RomeConfig, "one fact as a rank-one change", "arXiv:2202.05262"),
    "memit": Method(
        Memit, MemitConfig, "many facts over several layers, least squares", "arXiv:2210.07229"
    ),
    "emmet": Method(
        Emmet, EmmetConfig, "many facts at once, equality constraint", "arXiv:2403.14236"
    ),
    "ft": Method(
        FineTune, FineTuneConfig, "fine-tuning of one layer's MLP", "arXiv:2202.05262", _ALL
    ),
    "ft-l": Method(
        FineTuneLimited,
        FineTuneLimitedConfig,
        "fine-tuning, no weight moved further than a limit",
        "arXiv:2012.00363",
        _ALL,
    ),
    "ft-kl": Method(
        FineTuneKL,
        FineTuneKLConfig,
        "fine-tuning that holds on to what similar texts say",
        "arXiv:2110.11309",
        _ALL,
    ),
    "kn": Method(
        KnowledgeNeurons,
        KnowledgeNeuronsConfig,
        "the fact's own neurons, rewritten or erased",
        "arXiv:2104.08696",
        ("decoder", "encoder"),
    ),
    "grace": Method(
        Grace, GraceConfig, "a codebook with radii beside one layer", "arXiv:2211.11031", _ALL
    ),
    "ke": Method(Ke, KeConfig, "a network reads what should change", "arXiv:2104.08164", _ALL),
    "enn": Method(
        Enn, EnnConfig, "the model is retrained to be easily edited", "arXiv:2004.00345", _ALL
    ),
    "t-patcher": Method(
        TPatcher, TPatcherConfig, "one wrong token, one neuron", "arXiv:2301.09785", _ALL
    ),
    "serac": Method(
        Serac, SeracConfig, "edits as texts that a second model reads", "arXiv:2206.06520", _ALL
    ),
    "scen": Method(
        Scen, ScenConfig, "an expert and an indexing neuron for each edit", "arXiv:2404.02699", _ALL
    ),
    "mend": Method(
        Mend, MendConfig, "a network learns to make edits of gradients", "arXiv:2110.11309", _ALL
    ),
    "salem": Method(
        Salem, SalemConfig, "MEND's network on the salient blocks", "Findings of EACL 2024", _ALL
    ),
}
"""Name on the command line -> editor, config, paper: the one line that a new method adds."""
