"""Speed and memory of errata over a plain serial version, measured in one run.

    python -m benchmarks.run                                    all sections, the CPU table
    python -m benchmarks.run targets keys --model pocket        some of them
    python -m benchmarks.run --model random-llama-7b --device cuda

Prints the table and writes docs/benchmarks.json and docs/benchmarks.md: rows measured now replace
older rows of the same section, model and device, the others stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.choosing import CHOOSING_SECTIONS
from benchmarks.cluster import CLUSTER_SECTIONS
from benchmarks.gpu import GPU_SECTIONS
from benchmarks.hypernet import HYPERNET_SECTIONS
from benchmarks.measure import Row
from benchmarks.memories import MEMORY_SECTIONS
from benchmarks.sections import SECTIONS, Bench
from benchmarks.settings import SHAPES, Setting
from benchmarks.store import STORE_SECTIONS
from benchmarks.tracing import TRACING_SECTIONS
from errata.errors import ModelLoadError

CPU_SECTIONS = (
    SECTIONS
    | TRACING_SECTIONS
    | CHOOSING_SECTIONS
    | HYPERNET_SECTIONS
    | MEMORY_SECTIONS
    | STORE_SECTIONS
    | CLUSTER_SECTIONS
)
DOCS = Path(__file__).resolve().parent.parent / "docs"
HEADER = (
    "what",
    "model",
    "size",
    "serial s",
    "ours s",
    "ratio",
    "wanted",
    "difference",
    "serial MB",
    "ours MB",
    "over floor",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parser().parse_args(arguments)
    logging.getLogger("errata").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    console = Console()
    measured: list[dict[str, Any]] = []
    for name in options.model:
        try:
            setting = Setting.of(name, options.device, getattr(torch, options.dtype))
        except ModelLoadError as error:
            console.print(f"[yellow]{name} is skipped:[/] {error}")
            continue
        bench = Bench(
            setting,
            sizes=tuple(options.requests),
            serial_seconds=options.serial_seconds,
            moment_tokens=options.moment_tokens,
            cases=options.cases,
            rounds=options.rounds,
        )
        told = about(options)
        for section in options.section or list(
            CPU_SECTIONS if options.device == "cpu" else GPU_SECTIONS
        ):
            for row in (CPU_SECTIONS | GPU_SECTIONS)[section](bench):
                console.print(" | ".join(cells(as_record(row))))
                measured.append(as_record(row) | told)
    console.print(table(measured))
    if options.out:
        keep(options.out, measured)
        console.print(f"{options.out}/benchmarks.md and .json are written.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("section", nargs="*", help=f"of {', '.join(CPU_SECTIONS | GPU_SECTIONS)}")
    p.add_argument(
        "--model", nargs="+", choices=list(SHAPES), default=["random-gpt2-small", "pocket"]
    )
    p.add_argument("--requests", nargs="+", type=int, default=[16, 100])
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16"])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument(
        "--rounds", type=int, default=3, help="of the quick sections; the fastest counts"
    )
    p.add_argument("--cases", type=int, default=16, help="of scoring and generation")
    p.add_argument("--moment-tokens", type=int, default=20_000)
    p.add_argument(
        "--serial-seconds",
        type=float,
        default=240.0,
        help="serial targets are measured on as many requests as fit, and scaled",
    )
    p.add_argument("--out", type=Path, default=DOCS, help="folder to write to")
    return p


def about(options: argparse.Namespace) -> dict[str, Any]:
    """The command and what it ran on."""
    cuda = torch.cuda.get_device_name() if options.device.startswith("cuda") else ""
    words = ["python", "-m", "benchmarks.run", *options.section, "--model", *options.model]
    words += ["--requests", *map(str, options.requests), "--device", options.device]
    words += ["--dtype", options.dtype, "--serial-seconds", f"{options.serial_seconds:g}"]
    words += ["--cases", str(options.cases), "--moment-tokens", str(options.moment_tokens)]
    words += ["--rounds", str(options.rounds)]
    return {
        "device": cuda or f"{platform.machine()} CPU",
        "threads": options.threads,
        "torch": torch.__version__,
        "dtype": options.dtype,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(words),
    }


def as_record(row: Row) -> dict[str, Any]:
    """A row as JSON, what follows from its numbers included."""
    return vars(row) | {"ratio": row.ratio, "over_floor": row.over_floor, "agrees": row.agrees}


def cells(record: dict[str, Any]) -> list[str]:
    """A record as the table shows it."""

    def number(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    agrees = f" (more than {record['tolerance']:.0e})" if record["agrees"] is False else ""
    size = record["what"] + (f" ({record['note']})" if record["note"] else "")
    return [
        record["section"],
        record["model"],
        size,
        number(record["serial_seconds"], lambda x: f"{x:.3g}"),
        number(record["seconds"], lambda x: f"{x:.3g}"),
        number(record["ratio"], lambda x: f"{x:.1f}"),
        number(record["goal"], lambda x: f"{x:g}"),
        number(record["difference"], lambda x: f"{x:.0e}{agrees}"),
        number(record["serial_peak"], lambda x: f"{x / 1e6:.0f}"),
        number(record["peak"], lambda x: f"{x / 1e6:.0f}"),
        number(record["over_floor"], lambda x: f"{x:.2f}"),
    ]


def table(records: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    shown = Table(*HEADER, title="errata over a plain serial version")
    for record in records:
        shown.add_row(*cells(record))
    return shown


def keep(folder: Path, measured: Sequence[dict[str, Any]]) -> None:
    """Write both files; rows of the same section, model and device are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmarks.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    fresh = {_identity(record) for record in measured}
    records = [r for r in old if _identity(r) not in fresh] + list(measured)
    records.sort(key=lambda r: (r["device"], list(SHAPES).index(r["model"])))
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (folder / "benchmarks.md").write_text("\n".join(markdown(records)) + "\n", encoding="utf-8")


def markdown(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The page of the docs."""
    yield "# Benchmarks"
    yield ""
    yield "<!-- written by benchmarks/run.py -->"
    yield ""
    yield EXPLANATION
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(
            record[name] for name in ("device", "threads", "torch", "dtype", "date", "command")
        )
        runs.setdefault(key, []).append(record)
    for (device, threads, version, dtype, date, command), rows in runs.items():
        yield ""
        yield f"## {device}, {dtype}, {date}"
        yield ""
        yield f"`{command}` with torch {version}, {threads} thread{'s' if threads > 1 else ''}."
        yield ""
        yield "| " + " | ".join(HEADER) + " |"
        yield "|" + "---|" * 3 + "---:|" * (len(HEADER) - 3)
        for row in rows:
            yield "| " + " | ".join(cells(row)) + " |"


EXPLANATION = """\
What a plain serial version of the same algorithms takes (`benchmarks/serial.py`: one request or
case at a time, the whole model at every step, logits at every position, one pass over the text for
each layer, a fresh solve for each batch, as the reference repositories run it) over what errata
takes, both measured in the same run on the same machine.

- Requests have the lengths of CounterFact's: prompts of 8 to 12 tokens, subjects of 2 to 4, at most
  4 tokens after it, targets of 1 to 3; 5 contexts of some 10 tokens beside the bare prompt. Cases
  have 1 + 2 + 10 + 10 prompts, the two paraphrases each after a sentence.
- *difference*: the largest relative difference between the two results (of rows, by their norms).
  The optimisation of a few targets amplifies rounding: where it is more than 1e-4 there,
  `--dtype float64` brings the two within 1e-7 of each other.
- In `memory-grace` and `memory-scen` "serial" is the model without a memory and "ours" the same
  with one that holds so many edits, so that the ratio is the share of speed that is left; the
  texts, whose prompts are of one length, are equal.
- *MB*: peak memory beyond what was held before: resident memory on a CPU, allocated on a GPU.
- *over floor*: our time over the time that our multiplications take as plain matrix products at
  the rate measured on this machine just then, counted from shapes without padding and without
  attention's own products.
- On one CPU thread, seconds are the process' own, so that other programs on the machine count for
  neither side. *store* waits for the disk and goes by the clock; its serial version and its floor
  are those of `benchmarks/store.py`.
- *tracing-...*: serial is a full pass of the clean row and ten corrupted ones for each token and
  layer, measured on as many places as fit and scaled; differences are of probabilities.
- *choosing*: ours is saliency, serial our own causal tracing of every window of MLPs, for the same
  facts: two ways to say which layer to edit, with two answers.
- *fitting*: a step of MEND's outer loop, all gradients for its network; serial is the reference's
  loop, a functional copy of the model for each edit, as in `benchmarks/hypernet.py`.
- *learnt-edits*: serial is fine-tuning of the same matrices, another method with another result.
- *cluster-...* goes by the clock too, starting workers included: serial is one process without
  workers, the floor is that divided by the number of workers."""


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["section"], record["model"], record["device"], record["dtype"]


if __name__ == "__main__":
    main(sys.argv[1:])
