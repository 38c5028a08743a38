"""Work spread over processes: how much faster two workers are than one process.

    python -m benchmarks.cluster                    every map, with 1 and 2 processes
    python -m benchmarks.cluster targets --on ray   one of them, on a local Ray cluster
    python -m benchmarks.cluster --costs            what large models cost on many GPUs

The baseline is the same map in a loop in this process. Seconds are by the clock, starting workers
and loading the model included; on a machine that others use too, only processor time tells what a
second worker costs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.costs import markdown
from benchmarks.measure import Row, off
from benchmarks.sections import BATCH_TOKENS, Bench
from benchmarks.settings import SHAPES, Setting
from errata.jobs import shards
from errata.jobs.cluster import Where, held, map_
from errata.jobs.shards import Places, Source
from errata.jobs.studies.run import Job, work
from errata.jobs.studies.units import Unit

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
WORKERS = 1, 2
UNITS = 4
"""Of the study."""


def units(bench: Bench, source: Source, places: Places) -> Tensor:
    """Units of a study: MEMIT, each fact alone, and its scores."""
    found = Unit(
        model=source.name,
        label="MEMIT",
        method="memit",
        settings={"layers": list(bench.setting.shape.layers), "target": {"updates": 5}},
        count=-(-bench.cases // UNITS),
        corpus="pocket",
        corpus_tokens=bench.moment_tokens,
    ).to_dict()
    jobs: list[Job] = [(found | {"seed": seed}, "", "") for seed in range(UNITS)]
    means: dict[int, list[float]] = {}
    for done in map_(work, jobs, **places):
        if done.value is None:
            raise RuntimeError(f"a unit failed: {done.error}")
        means[done.index] = [one.mean for one in done.value.metrics.values()]
    return torch.tensor([means[index] for index in range(UNITS)])


def targets(bench: Bench, source: Source, places: Places) -> Tensor:
    """Targets of requests, in two shards."""
    s, n = bench.setting, max(bench.sizes)
    groups = [(request,) for request in s.requests[:n]]
    found = shards.targets(
        source,
        groups,
        s.contexts,
        s.layer,
        s.target,
        batch_tokens=BATCH_TOKENS,
        size=-(-n // 2),
        **places,
    )
    return found.streams + found.deltas


def moments(bench: Bench, source: Source, places: Places) -> Tensor:
    """Second moments of five layers."""
    s = bench.setting
    texts = s.texts(bench.moment_tokens)
    found = shards.moments(
        source, s.shape.moment_layers, texts, tokens=bench.moment_tokens, **places
    )
    return torch.stack(list(found.means.values()))


def scoring(bench: Bench, source: Source, places: Places) -> Tensor:
    """All protocols of scoring, in two shards."""
    cases = bench.setting.cases[: bench.cases]
    found = shards.scores(source, cases, size=-(-len(cases) // 2), **places)
    return torch.tensor([[row["metrics"]["EM"] for row in found.rows]])


def only_started(source: Source, places: Places) -> Tensor:
    """What a worker does before its first item: import, and load the model."""
    return torch.tensor([done.seconds for done in map_(depth, [source], **places)])


def depth(source: Source) -> int:
    """Blocks of a model."""
    return source.model().layers


MAPS: dict[str, Callable[[Bench, Source, Places], Tensor]] = {
    "units": units,
    "targets": targets,
    "moments": moments,
    "scoring": scoring,
}


def compared(name: str, bench: Bench, on: Where = "processes") -> Iterator[Row]:
    """A map in a loop, then with each number of workers."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, ERRATA_CACHE=folder):
        source = saved(bench.setting, Path(folder) / "model")
        alone: Places = {"on": "loop"}
        run = partial(MAPS[name], bench, source)
        run(alone)  # keeps moments on disk, which units share
        held("pocket")  # forgets the model, and targets that are remembered with it
        source.model()
        slow = timed(partial(run, alone))
        start = timed(partial(only_started, source, {"on": on, "workers": 1})).processor
        for workers in WORKERS:
            fast = timed(partial(run, {"on": on, "workers": workers}))
            clock = slow.seconds / fast.seconds / workers
            told = f"efficiency {clock:.0%} by the clock"
            if on == "processes":  # Ray's workers are not our children
                told += f", {slow.processor / fast.processor:.0%} by processor time; "
                busy = fast.processor - workers * start
                told += f"without {start:.1f} s to start each worker, {slow.processor / busy:.0%}"
            yield Row(
                section=f"cluster-{name}",
                model=bench.setting.name,
                what=f"{workers} {on}",
                seconds=fast.seconds,
                serial_seconds=slow.seconds,
                difference=off(fast.value, slow.value),
                tolerance=bench.tolerance,
                peak=None,
                serial_peak=None,
                floor=slow.seconds / workers,
                note=told,
            )


CLUSTER_SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    f"cluster-{name}": partial(compared, name) for name in MAPS
}
"""Name on the command line -> section."""


def saved(setting: Setting, folder: Path) -> Source:
    """The model where workers find it."""
    setting.lm.network.save_pretrained(folder)
    setting.lm.tokenizer.save_pretrained(folder)
    return Source(str(folder))


@dataclass(frozen=True)
class Timed:
    """What a map gave and took."""

    value: Tensor
    seconds: float
    processor: float
    """Seconds of this process and those that it started."""


def timed(do: Callable[[], Tensor]) -> Timed:
    """Run once, by the clock and by processor time."""
    began, busy = time.perf_counter(), _processor()
    value = do()
    return Timed(value, time.perf_counter() - began, _processor() - busy)


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    from benchmarks.run import HEADER, as_record, cells  # which lists our sections

    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    setting = Setting.of(options.model)
    bench = Bench(
        setting,
        sizes=(options.requests,),
        cases=options.cases,
        moment_tokens=options.moment_tokens,
    )
    if options.costs:
        lines = list(markdown(bench))
    else:
        names = options.map or list(MAPS)
        rows = [row for name in names for row in compared(name, bench, options.on)]
        lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
        lines += ["| " + " | ".join(cells(as_record(row))) + " |" for row in rows]
    words = [
        "python",
        "-m",
        "benchmarks.cluster",
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    told = f"`{' '.join(words)}`, {platform.machine()} CPU, {datetime.date.today().isoformat()}"
    page = "\n".join([told, "", *lines])
    Console(soft_wrap=True).print(page, markup=False, highlight=False)
    if options.write:
        write("costs" if options.costs else options.on, page)


def write(part: str, page: str) -> None:
    """Replace what stands between a part's two comments in docs/scale.md."""
    begin, end = f"<!-- {part}: written by benchmarks/cluster.py -->", f"<!-- end of {part} -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n{page}\n{end}{after}", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("map", nargs="*", help=f"of {', '.join(MAPS)}")
    p.add_argument("--on", choices=["processes", "ray"], default="processes")
    p.add_argument("--costs", action="store_true", help="print what large models cost instead")
    p.add_argument("--write", action="store_true", help="also write it into docs/scale.md")
    p.add_argument("--model", choices=list(SHAPES), default="pocket")
    p.add_argument("--requests", type=int, default=100)
    p.add_argument("--cases", type=int, default=32)
    p.add_argument("--moment-tokens", type=int, default=100_000)
    return p


if __name__ == "__main__":
    main()
