"""SaLEM: edit only the blocks that answer most for the mistakes (Mishra et al. 2024).

"Correcting Language Model Outputs by Editing Salient Layers". The gradients of the editing set,
every prompt with the answer that is wanted there, say how salient each block is (section 3.2,
equations 2 to 5, `locate.saliency`); MEND's network is then fitted to the K most salient blocks
alone (section 3.3).

Gradients may be large in a block whatever the example. `standardised` therefore compares those of
the editing set with those of what must stay, as Levin et al. (2022) do, whose saliency it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from errata.editors.hypernet.network import NetworkConfig, NetworkEditor, fit_network
from errata.editors.trainable import Fit, Trainable, TrainingCases
from errata.editors.wordings import neighbours, wordings
from errata.errors import ConfigError
from errata.lm.load import LanguageModel
from errata.locate.saliency import Saliency, saliency
from errata.progress import Progress, silent
from errata.requests import Case


@dataclass(frozen=True)
class SalemConfig(NetworkConfig):
    """SaLEM's numbers: MEND's, and how many blocks. Named `layers` are edited as they are."""

    count: int = 1
    """K: how many blocks are edited."""
    standardised: bool = False
    """Choose by how far a block's saliency lies above that of what must stay, in its standard
    deviations, rather than by the saliency itself."""

    def __post_init__(self) -> None:
        """Refuse to choose nothing."""
        super().__post_init__()
        self._positive("count")


class FittedSalem(NetworkEditor):
    """SaLEM, fitted."""

    name = "salem"


class Salem(Trainable):
    """SaLEM, to be fitted."""

    name = "salem"
    config: SalemConfig

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The blocks to edit, where they are named.

        Raises:
            ConfigError: they are not, or one is beyond the model's depth.
        """
        if not self.config.layers:
            raise ConfigError("salem finds its blocks when it is fitted; it has none before that.")
        return super().layers(lm)

    def fit(
        self,
        lm: LanguageModel,
        cases: TrainingCases,
        *,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> FittedSalem:
        """Find the salient blocks, then train the network (see `Trainable.fit`)."""
        cases.check()
        standardised = self.config.standardised
        profile = editing_set_saliency(
            lm, cases.train, standardised=standardised, progress=progress
        )
        layers = self.config.layers and self.layers(lm)
        return FittedSalem(
            *fit_network(
                lm,
                layers or sorted(profile.best(self.config.count, standardised=standardised)),
                cases,
                self.config,
                folder=folder,
                notes={"saliency": profile.to_dict()},
                progress=progress,
            )
        )

    def restored(self, fit: Fit, tensors: Mapping[str, Tensor]) -> FittedSalem:
        """The editor that a file holds."""
        return FittedSalem.restored(self.config, fit, tensors)


def editing_set_saliency(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    standardised: bool = False,
    progress: Progress = silent,
) -> Saliency:
    """The saliency of each block's MLP for all that is to be corrected, in every wording.

    Standardised values compare with as many neighbours of each case, where there are so many.

    Raises:
        ConfigError: they are asked for, and the cases have fewer than two neighbours.
    """
    examples, kept = [], []
    for case in cases:
        examples += wordings(case)
        kept += neighbours(case)[: len(wordings(case))]
    neutral = kept if standardised else None
    return saliency(lm, examples, neutral=neutral, modules="mlp", progress=progress)
