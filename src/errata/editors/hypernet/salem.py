"""SaLEM: edit only the blocks that answer most for the mistakes (Mishra et al. 2024).

"Correcting Language Model Outputs by Editing Salient Layers". The gradients of the editing set,
every prompt with the answer that is wanted there, say how salient each block is (section 3.2,
equations 2 to 5, `locate.saliency`); MEND's network is then fitted to the K most salient blocks
alone (section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from errata.editors.hypernet.network import NetworkConfig, NetworkEditor, fit_network
from errata.editors.trainable import Fit, Trainable, TrainingCases
from errata.editors.wordings import wordings
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
        profile = editing_set_saliency(lm, cases.train, progress=progress)
        layers = self.config.layers and self.layers(lm)
        return FittedSalem(
            *fit_network(
                lm,
                layers or sorted(profile.best(self.config.count)),
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
    lm: LanguageModel, cases: Sequence[Case], *, progress: Progress = silent
) -> Saliency:
    """The saliency of each block's MLP for all that is to be corrected, in every wording."""
    examples = [example for case in cases for example in wordings(case)]
    return saliency(lm, examples, modules="mlp", progress=progress)
