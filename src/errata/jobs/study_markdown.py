"""The report of a study as Markdown, with its charts as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from errata.jobs.claims import SIGNS, Claim
from errata.jobs.findings import Findings, UnitShown
from errata.jobs.tables import Number, Table, number, number_text


def markdown(found: Findings, pictures: Sequence[Sequence[str]]) -> str:
    """The report as Markdown.

    Args:
        found: what to tell.
        pictures: the file of each chart of each figure.
    """
    parts = [f"# {_plain(found.title)}", f"Experiment `{found.name}`. {found.reading}"]
    parts += ["## Claims", *map(_claim, found.claims)] if found.claims else []
    parts.append("## Tables")
    for table in found.tables:
        parts += [f"### {_plain(table.title)}", _table(table)]
    parts += ["## Figures"] if found.figures else []
    for figure, files in zip(found.figures, pictures, strict=True):
        parts.append(f"### {_plain(figure.title)}")
        parts += [f"![{_plain(c.title)}]({f})" for c, f in zip(figure.charts, files, strict=True)]
        parts.append(_table(figure.numbers))
    if lacking := found.lacking:
        parts.append("## What is lacking")
        parts.append(
            "\n".join(
                f"- {_plain(unit.what)}, seed {run.seed}: {run.state}. {_plain(run.told)}"
                for unit, run in lacking
            )
        )
    parts += ["## Runs", *map(_unit, found.units)]
    parts += ["## Machines and times", _machines(found)]
    return "\n\n".join(parts) + "\n"


def _claim(claim: Claim) -> str:
    lines = [f"**{_plain(claim.text)}**", ""]
    for one in claim.findings:
        told = ": ".join(filter(None, (one.place, f"**{one.verdict}**", one.told)))
        lines.append(f"- {SIGNS[one.verdict][1]} {told}")
        for each in one.evidence:
            sides = " and ".join(
                _number(number(c, claim.metric)) for c in (each.first, each.second)
            )
            told = f"{claim.metric} of {_plain(each.what)}: {each.told(claim.metric)} ({sides})"
            lines.append(f"  - {told}: {each.says}")
    return "\n".join(lines)


def _table(table: Table) -> str:
    over = [name for name, span in table.groups for _ in range(span)] or [""] * len(table.metrics)
    headings = [" ".join(filter(None, both)) for both in zip(over, table.metrics, strict=True)]
    rows = [(*labels, *map(_number, numbers)) for labels, numbers in table.lines]
    return _grid((*table.fields, *headings), rows)


def _number(one: Number) -> str:
    mean, span = number_text(one)
    return f"[{mean}](#{one.cell.name}) {span}".strip() if one.cell else mean


def _unit(unit: UnitShown) -> str:
    lines = [f'<a id="{unit.name}"></a>**{_plain(unit.what)}**', ""]
    for run in unit.runs:
        told = f"{run.state}, {_plain(run.told)}".removesuffix(", ")
        lines.append(f"- seed {run.seed}: {told} `{run.key}`".removesuffix(" ``"))
    if unit.config:
        lines += ["", "<details><summary>numbers</summary>", "", "```json", unit.config, "```"]
        lines += ["", "</details>"]
    return "\n".join(lines)


def _machines(found: Findings) -> str:
    return _grid(
        ("run", "machine", "time", "most memory", "ended", "versions"),
        [
            (f"`{m.key[:12]}`", m.host, f"{m.seconds:.1f} s", m.memory, m.created, m.versions)
            for m in found.machines
        ],
    )


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(told: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return " ".join(told.replace("|", "\\|").replace("<", "&lt;").split())
