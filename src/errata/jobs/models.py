"""Which models there are, and loading one by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from errata.jobs.tuned import TUNED, place, tuned_folder
from errata.lm.anatomy import FAMILIES
from errata.lm.load import POCKET, LanguageModel, pocket_folder
from errata.lm.shape import is_here
from errata.pocket.shapes import SHAPES

Model = LanguageModel | str | Path
"""A model in memory, or the name of one: `pocket`, `pocket-questions`, a folder, a Hub name."""


def as_model(model: Model, *, dtype: str | None = None, device: str | None = None) -> LanguageModel:
    """The model itself, loaded if it is a name.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    if isinstance(model, LanguageModel):
        return model
    lm = LanguageModel.load(located(str(model)), dtype=dtype, device=device)
    lm.name = str(model)
    return lm


def located(name: str) -> str:
    """What `LanguageModel.load` finds a model under; one that is tuned here is made if need be.

    Raises:
        GrowError: it cannot be made, or not be kept.
    """
    return str(tuned_folder(name)) if name in TUNED else name


def is_ready(name: str) -> bool:
    """Whether a model can be loaded without fetching or making it."""
    return place(name).is_dir() if name in TUNED else is_here(name)


def same_shape(name: str) -> str:
    """A model of the same shape that is found without work: itself, or what it is tuned from."""
    return str(SHAPES[name].base) if name in TUNED else name


def name_of(model: Model) -> str:
    """What the model is called."""
    return model.name if isinstance(model, LanguageModel) else str(model)


def is_pocket(model: Model) -> bool:
    """Whether it knows the pocket encyclopedia: it comes with errata, or is tuned from such."""
    return name_of(model) in (*POCKET, *TUNED)


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


def tuned() -> dict[str, str]:
    """Models that are made when first used -> the embedded model that each is made from."""
    return {name: same_shape(name) for name in TUNED}


def families() -> list[str]:
    """Model types that errata can edit."""
    return sorted(FAMILIES)
