"""The experiments that come with errata: every file is right, and does what it says it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from errata.jobs.methods import config_for
from errata.jobs.studies.declared import declared
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.keys import unit_key
from errata.jobs.tuned import TUNED
from errata.lm.load import POCKET

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
FILES = sorted(FOLDER.glob("*.toml"))


@cache
def experiment(name: str) -> Experiment:
    return Experiment.load(FOLDER / f"{name}.toml")


def keys(name: str) -> Set[str]:
    """What tells the units of an experiment from others, without hashing models and data."""
    return {
        unit_key(unit, model=unit.model, cases=f"{unit.data} {unit.count}", text="", code="")
        for unit in experiment(name).units()
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_right(file: Path) -> None:
    """It reads, its units are possible, and its tables, figures and claims fit them."""
    found = experiment(file.stem)
    shown = declared(found)
    assert shown.tables and found.units()
    for model in found.models:
        shape = {"layers", "d_model", "d_ff", "vocabulary"}
        assert model in (*POCKET, *TUNED) or shape <= found.about_models[model].keys()


@pytest.mark.parametrize("name", ["emmet-table1", "emmet-table2"])
def test_only_the_objective_differs(name: str) -> None:
    """ROME and MEMIT edit the same layers, with the same keys, contexts and targets."""
    configs: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for unit in experiment(name).units():
        if unit.method != "none":
            place = unit.model, unit.label.removeprefix(unit.method.upper())
            configs[place][unit.method] = config_for(
                unit.method, unit.model, unit.settings
            ).to_dict()
    assert len(configs) == {"emmet-table1": 2, "emmet-table2": 4}[name]
    for sides in configs.values():
        rome, memit = sides["rome"], sides["memit"]
        assert {field for field in rome if rome[field] != memit[field]} == {
            "relaxation",
            "one_at_a_time",
        }
        assert rome["relaxation"] == 0.0


def test_one_layer_and_several_have_the_same_targets() -> None:
    """The one layer is the last of the several, so that distribution alone differs."""
    layers = {
        unit.label: config_for(unit.method, unit.model, unit.settings).layers
        for unit in experiment("emmet-batches").units()
    }
    for method in ("MEMIT", "EMMET"):
        assert layers[f"{method}, one layer"] == layers[f"{method}, spread"][-1:]


@pytest.mark.parametrize(
    ("name", "source", "own"),
    [
        ("categories", "emmet-batches", 0),
        ("emmet-table2", "emmet-table1", 1 / 2),  # those of several layers
    ],
)
def test_what_another_experiment_has_computed_is_not_computed_again(
    name: str, source: str, own: float
) -> None:
    mine = keys(name)
    assert len(mine - keys(source)) == own * len(mine)
