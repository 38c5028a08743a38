"""What is killed: a process that runs a study. It is forked from one that has imported everything.

To be preloaded by a fork server, so that a hundred processes begin in the time of one.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from errata.jobs import score
from errata.jobs.studies.experiment import Experiment
from errata.jobs.studies.keys import code_hash
from errata.jobs.studies.run import run

for _method in ("memit", "emmet"):
    code_hash(_method)  # known to all that are forked


def study(file: Path, folder: Path, cache: Path) -> None:
    """Run an experiment's file on one thread; fails if a unit does."""
    os.environ["ERRATA_CACHE"] = str(cache)
    torch.set_num_threads(1)
    score.NEUTRAL = 4
    result = run(Experiment.load(file), folder=folder)
    assert not result.failed, result.failed


def begin(file: Path, folder: Path, cache: Path) -> BaseProcess:
    """Start such a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=study, args=(file, folder, cache))
    process.start()
    return process
