"""What is lost where SCEN keeps an expert's change to a matrix as a matrix of low rank.

Experts of some facts are trained once, and kept whole and at each rank. Told are the share of the
change that a rank misses, how many answers come out right on the experts, every token of them, and
the answers' loss.

    python -m benchmarks.ranks                       questions, 32 facts
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from errata.algebra.low_rank import LowRank
from errata.editors import Background
from errata.editors.difference import factors
from errata.edits.memory import MemoryEdit
from errata.jobs.cases import read_cases
from errata.jobs.methods import editor_for
from errata.jobs.models import as_model
from errata.lm.loss import Example
from errata.measure.editing import answered

RANKS = (1, 2, 4, 8, 16, None)


def main() -> None:
    """Print a line for each rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="pocket-questions")
    parser.add_argument("--data", help="of the facts; by default the model's own")
    parser.add_argument("--facts", type=int, default=32)
    options = parser.parse_args()
    lm = as_model(options.model)
    cases = read_cases(options.data or options.model, options.facts)
    settings = {"rank": None, "threshold": 0.01}  # an expert for every prompt
    editor = editor_for(lm, "scen", settings, Background())
    whole = editor.edit(lm, [case.request for case in cases])
    assert isinstance(whole, MemoryEdit)
    asked = [Example(case.request.text, case.request.target) for case in cases]
    print("| rank | missed of the change | right | loss, nats a token | bytes an edit |")
    print("|---:|---:|---:|---:|---:|")
    for rank in RANKS:
        kept, missed = cut(whole, rank)
        with kept.applied(lm):
            found = answered(lm, asked)
        loss = sum(found.nll) / len(asked)
        print(
            f"| {rank or 'all'} | {missed:.1%} | {found.accuracy:.1%} | {loss:.4f} | "
            f"{kept.nbytes // len(cases):,} |",
            flush=True,
        )


def cut(edit: MemoryEdit, rank: int | None) -> tuple[MemoryEdit, float]:
    """The same experts at a rank, and the mean share of their changes that it misses."""
    whole = [
        LowRank(left, right)
        for left, right in zip(edit.tensors["left"], edit.tensors["right"], strict=True)
    ]
    found = [factors(change.dense(), rank) for change in whole]
    tensors = dict(edit.tensors) | {
        "left": torch.stack([change.left for change, _ in found]),
        "right": torch.stack([change.right for change, _ in found]),
    }
    return replace(edit, tensors=tensors), sum(missed for _, missed in found) / len(found)


if __name__ == "__main__":
    main()
