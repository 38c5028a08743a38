"""The report of a study: one self-contained HTML page, the same as Markdown, figures as SVG.

It is drawn from the results and nothing else: the same results give the same bytes. Whatever
depends on the machine and the clock stands in one section at the end, so that a study that was
interrupted has the report of one that was not, but for that section.
"""

from __future__ import annotations

from pathlib import Path

from errata.jobs.figures import as_svg, save_figure
from errata.jobs.files import write_text
from errata.jobs.record import versions
from errata.jobs.report import page
from errata.jobs.studies.claims import SIGNS
from errata.jobs.studies.findings import Findings, gather
from errata.jobs.studies.markdown import markdown
from errata.jobs.studies.results import Results
from errata.jobs.studies.tables import LACKING, number, number_text


def save_study_report(results: Results, path: Path | str) -> tuple[Path, Path]:
    """Write the page at `path`, and beside it the Markdown and its figures.

    Returns:
        The page and the Markdown.

    Raises:
        ConfigError: a table, figure or claim does not fit the experiment.
        StorageError: a file cannot be written.
    """
    path, found = Path(path), gather(results)
    pictures: list[list[str]] = []
    for i, figure in enumerate(found.figures, 1):
        names = [f"{path.stem}-figure-{i}-{j}.svg" for j in range(1, len(figure.charts) + 1)]
        for name, chart in zip(names, figure.charts, strict=True):
            save_figure(chart.figure, path.with_name(name))
        pictures.append(names)
    told = write_text(path.with_suffix(".md"), markdown(found, pictures))
    return write_text(path, render(found)), told


def render(found: Findings) -> str:
    """The page as text."""
    return page(
        "studies/report.html",
        version=versions()["errata"],
        found=found,
        signs=SIGNS,
        lacking=LACKING,
        svg=as_svg,
        number=number,
        number_text=number_text,
    )
