"""Growing a small model from an encyclopedia, and measuring what it knows.

    python -m errata.pocket.grow --model pocket --out DIR     grows the shipped model again
    python -m errata.pocket.grow --check DIR                  says how many facts a model knows

What is read at each step is a function of the seed and the step alone, so that a run which was
stopped continues as if it had not been.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.errors import ErrataError, GrowError
from errata.pocket.card import card, write_model, write_text
from errata.pocket.encyclopedia import Encyclopedia
from errata.pocket.knowledge import load, measure
from errata.pocket.lessons import LESSONS, Lesson
from errata.pocket.shapes import SHAPES, GrowConfig, make_tokenizer, recipe
from errata.pocket.training import CHECKPOINT, Report, Watch, train
from errata.progress import Progress


def _unwatched(report: Report) -> None:
    """The progress nobody watches."""


def grow(
    config: GrowConfig,
    encyclopedia: Encyclopedia,
    out: str | Path,
    *,
    progress: Watch = _unwatched,
    resume: bool = False,
    checkpoints: str | Path | None = None,
    facts_from: str = "",
) -> Path:
    """Grows a model that knows the encyclopedia's facts.

    Args:
        config: shape, length, seed.
        encyclopedia: the facts, and how they are said.
        out: folder for weights (float16), configuration, tokenizer and model card.
        progress: called after every step.
        resume: continue from the folder's checkpoint if there is one.
        checkpoints: folder for the checkpoint; if left out, `out`, where it is removed in the end.
        facts_from: the fact file, for the card.

    Returns:
        The folder, loadable with Transformers.

    Raises:
        GrowError: a folder cannot be written, the checkpoint is of another run, the loss is not
            finite, or the facts cannot be said as this model needs it.
    """
    out, aside = Path(out), Path(checkpoints or out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GrowError(f"cannot write to {out}: {error}") from error
    lesson = LESSONS[config.model](encyclopedia, config)
    network, tokenizer = _seedling(config, lesson)
    nn.Module.to(network, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config, state = train(
        network,
        tokenizer,
        lesson,
        config,
        aside,
        told={"facts": encyclopedia.digest},
        resume=resume,
        progress=progress,
    )
    write_model(network, tokenizer, out)
    tuned = SHAPES[config.model].base is not None
    known = measure(network, tokenizer, encyclopedia, tuned=tuned, progress=_stage(progress))
    told = card(config, lesson.facts, network, tokenizer, known, state, facts_from=facts_from)
    write_text(out / "README.md", told)
    if aside == out:
        (out / CHECKPOINT).unlink()
    return out


def _seedling(
    config: GrowConfig, lesson: Lesson
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """What training begins with: random weights, or those of the model that is tuned."""
    shape = SHAPES[config.model]
    if shape.base is None:
        tokenizer = make_tokenizer(lesson.texts(), config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return shape.network(config, len(tokenizer)), tokenizer
    return load(weights_folder(shape.base))


def weights_folder(name: str) -> Path:
    """Where an embedded model's files are."""
    return Path(str(resources.files("errata.pocket"))) / "weights" / name


def _stage(progress: Watch) -> Progress:
    """Tells of (stage, done, total) what else is told of steps."""
    return lambda stage, done, total: progress(
        Report(done, total, math.nan, math.nan, math.nan, stage)
    )


def _draw() -> tuple[Any, Watch]:
    """A progress bar and the callback that moves it; now and then a line where nobody watches."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("{task.description}", "{task.fields[said]}")
    bar = Progress(
        TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TimeRemainingColumn()
    )
    tasks: dict[str, Any] = {}
    told = -math.inf

    def watch(report: Report) -> None:
        nonlocal told
        said = f"{report.step:,} of {report.steps:,}"
        if not math.isnan(report.loss):
            said += f"  loss {report.loss:.3f}  {report.tokens_per_second:,.0f} tokens/s"
        if report.stage not in tasks:
            tasks[report.stage] = bar.add_task(report.stage, said="")
        bar.update(tasks[report.stage], completed=report.step, total=report.steps, said=said)
        if not bar.console.is_terminal and time.monotonic() - told > 30:
            told = time.monotonic()
            left = (
                ""
                if math.isnan(report.seconds_left)
                else f", {report.seconds_left / 60:.1f} min left"
            )
            bar.console.print(f"{report.stage}: {said}{left}")

    return bar, watch


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m errata.pocket.grow`."""
    parser = argparse.ArgumentParser(
        prog="python -m errata.pocket.grow", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="pocket")
    parser.add_argument(
        "--facts", type=Path, help="a fact file of yours; the shipped facts if left out"
    )
    parser.add_argument("--out", type=Path, help="where to put the model")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="measure what the model there knows; grow nothing"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="the recipe's if left out")
    length.add_argument("--tokens", type=float, help="a decoder's tokens to read, e.g. 6e6")
    length.add_argument("--minutes", type=float, help="about how long to train on this machine")
    parser.add_argument("--seed", type=int, default=GrowConfig.seed)
    parser.add_argument("--layers", type=int, help="the recipe's if left out")
    parser.add_argument("--width", type=int, help="the recipe's if left out")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument(
        "--checkpoints", type=Path, help="where to keep checkpoints, if not in the model's folder"
    )
    given = parser.parse_args(arguments)
    try:
        encyclopedia = Encyclopedia.read(given.facts) if given.facts else Encyclopedia.load()
        if given.check:
            network, tokenizer = load(given.check)
            bar, watch = _draw()
            with bar:
                known = measure(
                    network,
                    tokenizer,
                    encyclopedia,
                    tuned=SHAPES[given.model].base is not None,
                    progress=_stage(watch),
                )
            print(known.table())
            return
        if not given.out:
            parser.error("--out DIR is needed, to put the model in")
        config = recipe(
            given.model,
            steps=given.steps,
            minutes=given.minutes,
            seed=given.seed,
            layers=given.layers,
            width=given.width,
        )
        if given.tokens is not None:
            config = config.lasting(given.tokens)
        bar, watch = _draw()
        with bar:
            grow(
                config,
                encyclopedia,
                given.out,
                progress=watch,
                resume=given.resume,
                checkpoints=given.checkpoints,
                facts_from=str(given.facts or ""),
            )
        print(f"{given.model} is in {given.out}")
    except ErrataError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
