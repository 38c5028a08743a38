"""The report of a run: one self-contained HTML page, drawn from the record and nothing else.

Everything that a model or a user wrote is escaped by the template engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from errata.jobs.files import write_text
from errata.jobs.record import Change, Fact, RunRecord, Said, ScoreLine
from errata.measure.metrics import Estimate

SHAPES = (
    ("hollow", "\N{WHITE CIRCLE}"),
    ("filled", "\N{BLACK CIRCLE}"),
    ("diamond", "\N{BLACK DIAMOND}"),
)
"""How the first models are drawn, so that no reader needs colours; further ones are squares."""

LABELS = {
    "prompt": "prompts corrected",
    "paraphrase": "paraphrases corrected",
    "neighbour": "neighbours kept",
    "same subject": "other facts of the subject kept",
}


def save_report(record: RunRecord, path: Path | str) -> tuple[Path, Path]:
    """Write the page at `path` and the record as JSON beside it.

    Returns:
        The two files.

    Raises:
        StorageError: a file cannot be written.
    """
    page = write_text(path, render(record))
    return page, record.save(page.with_suffix(".json"))


def render(record: RunRecord) -> str:
    """The page as text."""
    return page(
        "report.html",
        version=record.versions.get("errata", ""),
        record=record,
        edited=any(said.after is not None for fact in record.facts for said in fact.said),
        hidden=record.fact_count > len(record.facts),
        tiles=_tiles(record),
        markers=[{"name": n, "sign": _shape(i)[1]} for i, n in enumerate(record.models)],
        scores=[_score_row(line) for line in record.scores],
        changes=_change_rows(record.changes),
        made=_made(record),
        config=json.dumps(record.config, indent=2, ensure_ascii=False, default=str)
        if record.config
        else "",
        fact_text=lambda fact: fact.prompt.replace("{}", fact.subject),
        tally=_tally,
        tone=_tone,
        sign=_sign,
    )


def page(template: str, **values: Any) -> str:
    """A page from a template of these folders; those that extend `page.html` share its look.

    Args:
        template: the path of its file from here.
        values: what it shows; all of it is escaped unless it is `markupsafe.Markup`. `page.html`
            itself shows `version`, errata's.
    """
    environment = Environment(
        autoescape=True,
        loader=FunctionLoader(_template),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _template(name: str) -> str:
    return (resources.files("errata.jobs") / name).read_text(encoding="utf-8")


def counts(facts: Sequence[Fact]) -> dict[str, tuple[int, int]]:
    """Kind of prompt -> (how many are as wanted, how many there are).

    A neighbour that the unedited model got wrong cannot be kept, and is left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for said in (said for fact in facts for said in fact.said):
        if (
            said.after is not None
            and said.kind in ("neighbour", "same subject")
            and not said.right_before
        ):
            continue
        right, total = found.get(said.kind, (0, 0))
        found[said.kind] = (right + said.right, total + 1)
    return found


def size_text(count: float) -> str:
    """Bytes for people: `412 kB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return (
                f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
            )
        count /= 1000
    return f"{count:.1f} GB"


def _tiles(record: RunRecord) -> list[dict[str, str]]:
    edited = any(said.after is not None for fact in record.facts for said in fact.said)
    tiles = [
        {
            "value": f"{right} of {total}",
            "label": LABELS[kind] if edited else f"{kind}s answered as wanted",
        }
        for kind, (right, total) in counts(record.facts).items()
    ]
    if record.edit_bytes:
        tiles.append({"value": size_text(record.edit_bytes), "label": "the edit file"})
    if record.seconds:
        tiles.append(
            {"value": f"{sum(record.seconds.values()):.0f} s", "label": "from start to end"}
        )
    return tiles


def _shape(index: int) -> tuple[str, str]:
    return SHAPES[index] if index < len(SHAPES) else ("square", "\N{BLACK SQUARE}")


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def told(line: ScoreLine, estimate: Estimate | None) -> Estimate | None:
    """The estimate as people read it: shares times 100."""
    if estimate is None or not line.percent:
        return estimate
    mean, low, high, n = estimate
    return Estimate(100 * mean, 100 * low, 100 * high, n)


def _score_row(line: ScoreLine) -> dict[str, Any]:
    estimates = [told(line, estimate) for estimate in line.estimates]
    shown = [(i, e) for i, e in enumerate(estimates) if e is not None]
    return {
        "name": line.name,
        "meaning": line.meaning,
        "cells": [{"value": v, "interval": i} for v, i in map(estimate_text, estimates)],
        "height": 18 + 14 * max(0, len(shown) - 1),
        "spoken": ", then ".join(_number(e.mean) for _, e in shown),
        "marks": [
            {
                "x": _place(e.mean),
                "low": _place(e.mean if math.isnan(e.low) else e.low),
                "high": _place(e.mean if math.isnan(e.high) else e.high),
                "y": 9 + 14 * row,
                "shape": _shape(i)[0],
            }
            for row, (i, e) in enumerate(shown)
        ]
        if line.percent
        else [],
    }


def _place(percent: float) -> float:
    return round(10 + 2 * min(100.0, max(0.0, percent)), 1)


def estimate_text(estimate: Estimate | None) -> tuple[str, str]:
    """The mean and its interval; either may be empty."""
    if estimate is None or math.isnan(estimate.mean):
        return "\N{EN DASH}", ""
    if math.isnan(estimate.low):
        return _number(estimate.mean), ""
    return _number(estimate.mean), f"[{_number(estimate.low)}, {_number(estimate.high)}]"


def _change_rows(changes: Sequence[Change]) -> list[dict[str, Any]]:
    sizes = [change.norm if change.relative is None else change.relative for change in changes]
    largest = max(sizes, default=0.0) or 1.0
    return [
        {
            "path": change.path,
            "rank": change.rank,
            "norm": _number(change.norm),
            "share": "" if change.relative is None else f"{100 * change.relative:.2f}%",
            "width": round(220 * size / largest, 1),
        }
        for change, size in zip(changes, sizes, strict=True)
    ]


def _made(record: RunRecord) -> list[tuple[str, str]]:
    rows = [("Model", record.model)]
    if record.method:
        rows.append(("Method", record.method))
    if record.edit_file:
        rows.append(("Edit file", f"{record.edit_file} ({size_text(record.edit_bytes)})"))
    if record.fact_count:
        rows.append(("Facts", str(record.fact_count)))
    if record.seed is not None:
        rows.append(("Seed", str(record.seed)))
    rows += [(f"Time: {stage}", f"{seconds:.1f} s") for stage, seconds in record.seconds.items()]
    rows.append(("Versions", ", ".join(f"{name} {v}" for name, v in record.versions.items())))
    return rows


def _tally(fact: Fact) -> str:
    return " \N{MIDDLE DOT} ".join(f"{r}/{t} {LABELS[k]}" for k, (r, t) in counts([fact]).items())


def _tone(said: Said) -> str:
    if said.right:
        return "good"
    return "fair" if said.verdict == "wrong before" else "bad"


def _sign(said: Said) -> str:
    if said.right:
        return "\N{CHECK MARK}"
    return "\N{MIDDLE DOT}" if said.verdict == "wrong before" else "\N{BALLOT X}"
