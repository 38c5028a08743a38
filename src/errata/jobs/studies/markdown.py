"""The report of a study as Markdown, with its charts as files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.jobs.studies.claims import SIGNS, Claim
from errata.jobs.studies.findings import Findings, Machine, UnitShown
from errata.jobs.studies.tables import Number, Table, number, number_text

_FEW = 2
"""Numbers that may be other than those of a unit that is pointed at."""


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
    parts += ["## Runs", *_units(found.units)]
    parts += ["## Machines and times", *_machines(found)]
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


def _units(units: Sequence[UnitShown]) -> Iterator[str]:
    """Each unit's runs and numbers; of numbers told before, only what is other."""
    told: list[tuple[UnitShown, dict[str, Any]]] = []
    for unit in units:
        lines = [f'<a id="{unit.name}"></a>**{_plain(unit.what)}**', ""]
        for run in unit.runs:
            state = f"{run.state}, {_plain(run.told)}".removesuffix(", ")
            lines.append(f"- seed {run.seed}: {state} `{run.key}`".removesuffix(" ``"))
        config: dict[str, Any] = json.loads(unit.config) if unit.config else {}
        like = [(one, _other(config, numbers)) for one, numbers in told]
        first = next(((one, other) for one, other in like if other is not None), None)
        if first:
            other = ", ".join(f"`{key}` {json.dumps(value)}" for key, value in first[1].items())
            but = f", but {other}" if other else ""
            lines.append(f"- numbers: those of [{_plain(first[0].what)}](#{first[0].name}){but}")
        elif config:
            told.append((unit, config))
            lines += ["", "<details><summary>numbers</summary>", "", "```json", unit.config]
            lines += ["```", "", "</details>"]
        yield "\n".join(lines)


def _other(config: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any] | None:
    """The numbers that are not those told; None where they are of another kind, or too many."""
    if not config or config.keys() != told.keys():
        return None
    other = {key: value for key, value in config.items() if value != told[key]}
    return other if len(other) <= _FEW else None


def _machines(found: Findings) -> Iterator[str]:
    """A table for each machine and its versions."""
    places: dict[tuple[str, str], list[Machine]] = {}
    for one in found.machines:
        places.setdefault((one.host, one.versions), []).append(one)
    for (host, versions), runs in places.items():
        yield f"{_plain(host)}; {_plain(versions)}"
        yield _grid(
            ("run", "time", "most memory", "ended"),
            [(f"`{m.key[:12]}`", f"{m.seconds:.1f} s", m.memory, m.created) for m in runs],
        )


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(told: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return " ".join(told.replace("|", "\\|").replace("<", "&lt;").split())
