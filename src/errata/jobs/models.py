"""Which models there are, and loading one by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from errata.lm.anatomy import FAMILIES
from errata.lm.load import POCKET, LanguageModel, pocket_folder

Model = LanguageModel | str | Path
"""A model in memory, or the name of one: `pocket`, a folder, a Hub name."""


def as_model(model: Model, *, dtype: str | None = None, device: str | None = None) -> LanguageModel:
    """The model itself, loaded if it is a name.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    if isinstance(model, LanguageModel):
        return model
    return LanguageModel.load(model, dtype=dtype, device=device)


def name_of(model: Model) -> str:
    """What the model is called."""
    return model.name if isinstance(model, LanguageModel) else str(model)


def is_pocket(model: Model) -> bool:
    """Whether it is one of the models that come with errata, which know the pocket encyclopedia."""
    return name_of(model) in POCKET


@dataclass(frozen=True)
class Pocket:
    """A model that comes with errata."""

    name: str
    folder: Path
    nbytes: int
    """Size of its weights; 0 where they are missing."""


def pockets() -> list[Pocket]:
    """The embedded models."""
    found = []
    for name in POCKET:
        folder = pocket_folder(name)
        weights = folder / "model.safetensors"
        found.append(Pocket(name, folder, weights.stat().st_size if weights.exists() else 0))
    return found


def families() -> list[str]:
    """Model types that errata can edit."""
    return sorted(FAMILIES)
