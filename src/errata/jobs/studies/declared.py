"""What an experiment declares to show, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from errata.errors import ConfigError
from errata.jobs.studies.cells import Run
from errata.jobs.studies.charts import as_table
from errata.jobs.studies.claims import judge
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.shown import Shown
from errata.jobs.studies.tables import tabulate


def declared(experiment: Experiment) -> Shown:
    """The tables, figures and claims of an experiment, tried on its units without results.

    Raises:
        ConfigError: one of them is wrong, or does not tell the experiment's runs apart.
    """
    runs = [Run(unit.to_dict()) for unit in experiment.units()]
    try:
        shown = Shown.read(experiment.reported)
    except ConfigError as error:
        raise ConfigError(f"{experiment.path}: {error}") from error
    for name, attempt in _attempts(shown, runs):
        try:
            attempt()
        except ConfigError as error:
            raise ConfigError(f"{experiment.path}: {name}: {error}") from error
    return shown


def _attempts(shown: Shown, runs: Sequence[Run]) -> Iterator[tuple[str, Callable[[], object]]]:
    for number, table in enumerate(shown.tables, 1):
        yield f"table {number}", partial(tabulate, table, runs)
    for number, figure in enumerate(shown.figures, 1):
        yield f"figure {number}", partial(tabulate, as_table(figure), runs)
    for number, claim in enumerate(shown.claims, 1):
        yield f"claim {number}", partial(judge, claim, runs)
