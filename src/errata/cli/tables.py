"""What people see of facts and scores in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from errata.jobs.record import Fact, Said, ScoreLine

HEADLINE = (
    "S",
    "Efficacy (ES)",
    "Generalisation (PS)",
    "Specificity (NS)",
    "Same subject (success)",
    "Rewrite (free)",
    "Paraphrases (free)",
    "Neighbours (free)",
    "Same subject (free)",
    "Fluency (GE)",
    "Consistency (RS)",
    "Drift on neighbours",
    "Drift on neutral text",
    "Perplexity",
)
"""The scores that a terminal shows; `--all-scores`, the report and the JSON have all of them."""


WIDE = 110
"""Columns from which a table also explains its scores."""


def counted(count: int, noun: str) -> str:
    """`1 fact`, `2 facts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def plain(*headings: str, wrap: bool = True) -> Table:
    """A quiet table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(heading, overflow="fold" if wrap else "ellipsis")
    return table


def clipped(text: str, width: int = 30) -> str:
    """The first sentence of a continuation, on one line, not too long."""
    line = " ".join(text.split())
    sentence = re.split(r"(?<=[a-z)][.?!])\s", line, maxsplit=1)[0]
    return (
        sentence
        if len(sentence) <= width
        else sentence[: width - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    )


def show_facts(console: Console, facts: Iterable[Fact], *, per_kind: int = 1) -> None:
    """Each fact with what the model said before and says now."""
    for fact in facts:
        console.print()
        title = Text()
        before, after = fact.prompt.split("{}", 1)
        title.append(before).append(fact.subject, "bold").append(after).append(" ")
        if fact.true:
            title.append(fact.true.strip(), "strike red").append(" ")
        title.append("\N{RIGHTWARDS ARROW} ").append(fact.target.strip(), "bold green")
        console.print(title)
        table = plain("", "asked", "before", "now", "")
        for said in _first(fact.said, per_kind):
            table.add_row(
                Text(said.kind, "dim"),
                Text(_tail(said.prompt)),
                Text(clipped(said.before)),
                Text(clipped(said.after or "")),
                _verdict(said),
            )
        console.print(table)


def show_scores(
    console: Console,
    models: Sequence[str],
    scores: Sequence[ScoreLine],
    *,
    everything: bool = False,
) -> None:
    """Scores side by side, with their intervals."""
    explained = console.width >= WIDE
    table = plain("score", *models, *(["what it says"] if explained else []))
    for line in scores:
        if everything or line.name in HEADLINE:
            meaning = [Text(line.meaning, "dim")] if explained else []
            table.add_row(Text(line.name), *_cells(line), *meaning)
    console.print(table)


def recorded(scores: Mapping[str, Any], *, everything: bool = False) -> Table:
    """Scores as an edit file keeps them: model -> metric -> [mean, low, high, cases]."""
    from errata.jobs.score import recorded_lines

    table = plain("score", *scores)
    for line in recorded_lines(scores):
        if everything or line.name in HEADLINE:
            table.add_row(Text(line.name), *_cells(line))
    return table


def _cells(line: ScoreLine) -> list[Text]:
    from errata.jobs.report import estimate_text, told

    return [
        Text.assemble(mean, (f" {span}" if span else "", "dim"))
        for mean, span in (estimate_text(told(line, e)) for e in line.estimates)
    ]


def _first(said: Sequence[Said], per_kind: int) -> list[Said]:
    taken: dict[str, int] = {}
    kept = []
    for one in said:
        taken[one.kind] = taken.get(one.kind, 0) + 1
        if taken[one.kind] <= per_kind:
            kept.append(one)
    return kept


def _tail(prompt: str, width: int = 52) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= width else "\N{HORIZONTAL ELLIPSIS}" + line[-width + 1 :].lstrip()


def _verdict(said: Said) -> Text:
    if said.right:
        return Text(f"\N{CHECK MARK} {said.verdict}", "green")
    if said.verdict == "wrong before":
        return Text(f"\N{MIDDLE DOT} {said.verdict}", "dim")
    return Text(f"\N{BALLOT X} {said.verdict}", "red")
