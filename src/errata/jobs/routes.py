"""Which expert answers to which edit: the activations of a memory's indexing neurons, as a picture.

An edit of SCEN keeps the inputs at its own prompts beside its neurons, so that no model is needed.
(Yao et al. 2024, figure 3.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.edits.edit import Edit
from errata.edits.memories.experts import Experts
from errata.edits.memory import MemoryEdit, live_entries
from errata.errors import ConfigError
from errata.jobs.figures import blank, check_figure, counted, head, save_figure, style, subtitle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES = 0.05
"""Of a cell, unless the picture would become too small or too large."""


@dataclass(frozen=True)
class Routes:
    """How strongly each neuron answers to each edit's own prompt."""

    activations: tuple[tuple[float, ...], ...]
    """(edits, experts), in order."""
    experts: tuple[int, ...]
    """Of each edit, the number of its own expert."""
    threshold: float
    """Above which an expert takes over."""

    @property
    def right(self) -> int:
        """How many edits reach their own expert."""
        return sum(
            max(range(len(row)), key=row.__getitem__) == own and row[own] > self.threshold
            for row, own in zip(self.activations, self.experts, strict=True)
        )


def routes(edit: Edit) -> Routes:
    """The activations of an edit's experts, all those of a stack together.

    Raises:
        ConfigError: it has no experts, or experts at several places or thresholds.
    """
    parts = [p for p in edit.parts if isinstance(p, MemoryEdit) and p.kind == "experts"]
    if not parts:
        raise ConfigError(
            f"{edit} has no experts, so there is nothing to route. Edits of `scen` have."
        )
    places = {(part.path, part.settings["threshold"]) for part in parts}
    if len(places) > 1:
        raise ConfigError(
            f"{edit} has experts at several places or thresholds: {sorted(places)}. Give an edit "
            "with those of one."
        )
    ((_, threshold),) = places
    entries = live_entries(parts)
    neurons = torch.stack([entry.tensors["neurons"] for entry in entries])
    asked: dict[str, tuple[int, Tensor]] = {}  # of a prompt written twice, the later expert's
    for number, entry in enumerate(entries):
        for request, prompt in zip(entry.requests, entry.tensors["prompts"], strict=False):
            asked[request.text] = number, prompt
    own, prompts = zip(*asked.values(), strict=True)
    rows = Experts.activated(neurons, torch.stack(prompts)).tolist()
    return Routes(tuple(map(tuple, rows)), own, float(threshold))


def routes_map(found: Routes) -> Figure:
    """A heat map, edits from top to bottom and experts from left to right."""
    edits, experts = len(found.activations), len(found.activations[0])
    with style():
        figure, (axes,) = blank(
            1.8 + min(6.0, max(2.4, _INCHES * experts)), 1.3 + min(6.0, max(2.0, _INCHES * edits))
        )
        mesh = axes.pcolormesh(
            [list(row) for row in found.activations], cmap="Blues", vmin=0.0, vmax=1.0
        )
        mesh.set_rasterized(True)  # an SVG would hold each cell as a shape
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        subtitle(axes, "activation at each edit's own prompt")
        axes.set_xlabel("expert")
        axes.set_ylabel("edit")
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24)
        bar.outline.set_visible(False)
        bar.ax.axhline(found.threshold, color="black", lw=1.0)
        head(
            figure,
            "Which expert answers to which edit",
            f"{found.right} of {counted(edits, 'edit')} reach their own expert above "
            f"{found.threshold:g}; {counted(experts, 'expert')}",
        )
    return figure


def draw_routes(edit: Edit, path: Path | str) -> Routes:
    """Write the picture, and say what it shows.

    Raises:
        ConfigError: the edit has no experts.
        StorageError: the picture cannot be written.
    """
    check_figure(path)
    found = routes(edit)
    save_figure(routes_map(found), path)
    return found
