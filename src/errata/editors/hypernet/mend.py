"""MEND: a network that makes an edit of a fine-tuning gradient (Mitchell et al. 2022).

"Fast Model Editing at Scale", arXiv:2110.11309. The network is `transform.Update`, fitted to the
MLP matrices of the last three blocks (of an encoder-decoder: of its decoder's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from errata.editors.hypernet.learnt import last_blocks
from errata.editors.hypernet.network import NetworkConfig, NetworkEditor, fit_network
from errata.editors.trainable import Fit, Trainable, TrainingCases
from errata.lm.load import LanguageModel
from errata.progress import Progress, silent


@dataclass(frozen=True)
class MendConfig(NetworkConfig):
    """MEND's numbers; the papers' own where nothing else is said."""


class FittedMend(NetworkEditor):
    """MEND, fitted."""

    name = "mend"


class Mend(Trainable):
    """MEND, to be fitted."""

    name = "mend"
    config: MendConfig

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """The blocks to edit: those that are named, or the last three.

        Raises:
            ConfigError: a layer is beyond the model's depth.
        """
        return super().layers(lm) if self.config.layers else last_blocks(lm)

    def fit(
        self,
        lm: LanguageModel,
        cases: TrainingCases,
        *,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> FittedMend:
        """Train the network (see `Trainable.fit`)."""
        return FittedMend(
            *fit_network(
                lm,
                self.layers(lm),
                cases,
                self.config,
                folder=folder,
                notes={},
                progress=progress,
            )
        )

    def restored(self, fit: Fit, tensors: Mapping[str, Tensor]) -> FittedMend:
        """The editor that a file holds."""
        return FittedMend.restored(self.config, fit, tensors)
