"""Map a function over items: in a loop, in processes of this machine, or on a Ray cluster.

What travels is a top-level function, picklable items and picklable values; never a live model: a
worker loads its own with `held`, once. Workers write nothing, only values come back. A worker that
dies (killed, out of memory) costs nothing but the item it was at, which is done again elsewhere.

A script that uses processes needs `if __name__ == "__main__":` around its work, as every program
that spawns processes does.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch

from errata.errors import ClusterError, ConfigError, ErrataError
from errata.progress import Progress, silent

if TYPE_CHECKING:
    from errata.lm.load import LanguageModel

Item = TypeVar("Item")
Value = TypeVar("Value")
Where = Literal["loop", "processes", "ray"]

WHERE: tuple[Where, ...] = ("loop", "processes", "ray")
"""The places where work can be done."""

_PATIENCE = 10.0
"""Seconds that an idle worker has to end by itself, which leaves nothing behind."""

_held: dict[tuple[str, str | None, str | None], LanguageModel] = {}


@dataclass(frozen=True)
class Done(Generic[Value]):
    """What became of one item."""

    index: int
    """Which item, from 0."""
    value: Value | None
    """What the function returned; None if it failed."""
    error: str | None
    """Why it failed: an ErrataError's text, any other exception with its traceback."""
    seconds: float
    """How long the function ran; for an item whose worker died, since it was last handed out."""


def map_(
    function: Callable[[Item], Value],
    items: Iterable[Item],
    *,
    on: Where = "loop",
    workers: int | None = None,
    address: str | None = None,
    tries: int = 3,
    progress: Progress = silent,
) -> Iterator[Done[Value]]:
    """Call the function on every item; the same values wherever it is done.

    Leaving the iterator early, or an interrupt, ends all workers.

    Args:
        function: a top-level one, importable where the workers are.
        items: picklable; few and small, as work is described by names and settings.
        on: "loop", here and one after the other; "processes", spawned on this machine; "ray".
        workers: how many at once; by default one for each GPU, or for each core where there is
            none, and on a given cluster as many as it has room for.
        address: of the Ray cluster; by default one is started on this machine, and ended after.
        tries: how often an item is begun whose worker dies, before it is given up.
        progress: told how many items are done.

    Returns:
        One `Done` for each item, in the order in which they are finished.

    Raises:
        ConfigError: a setting is impossible.
        ClusterError: the function or an item cannot be sent; Ray is missing or not reached; no
            worker starts.
    """
    if on not in WHERE:
        raise ConfigError(f"work is done on one of {', '.join(WHERE)}; not on {on!r}.")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be 1 or more, got {workers}.")
    if tries < 1:
        raise ConfigError(f"tries must be 1 or more, got {tries}.")
    if address is not None and on != "ray":
        raise ConfigError(f"an address is one of a Ray cluster; work on {on!r} has none.")
    items = list(items)
    call = _pickled(function, "the function")
    parcels = [_pickled(item, f"item {index}") for index, item in enumerate(items)]
    if not items:
        return iter(())
    if address is None:
        workers = min(workers or room(), len(items))
    if on == "loop":
        found: Iterator[Done[Value]] = _in_loop(function, items)
    elif on == "processes":
        assert workers is not None
        found = _in_processes(call, parcels, workers, tries)
    else:
        found = _on_ray(function, items, workers, address, tries)
    return _counted(found, len(items), progress)


def held(name: str, dtype: str | None = None, device: str | None = None) -> LanguageModel:
    """The model of this process: loaded once, and kept until another one is asked for.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    from errata.jobs.models import as_model  # so that a worker starts at once

    key = (name, dtype, device)
    if key not in _held:
        _held.clear()  # first: there may be no room for two
        _held[key] = as_model(name, dtype=dtype, device=device)
    return _held[key]


def room() -> int:
    """How many workers this machine has room for: one for each GPU, or for each core."""
    return torch.cuda.device_count() or _cores()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(workers: int) -> int:
    """Of each worker's share of the cores; never more than this process takes itself."""
    return min(torch.get_num_threads(), max(1, _cores() // workers))


def _pickled(thing: object, what: str) -> bytes:
    try:
        return pickle.dumps(thing)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ClusterError(
            f"{what} cannot be sent to a worker: {error}. Use a function at the top level of a "
            "module (no lambda, none inside another function) and items of plain values."
        ) from error


def _counted(found: Iterator[Done[Value]], total: int, progress: Progress) -> Iterator[Done[Value]]:
    for count, done in enumerate(found, 1):
        progress("items", count, total)
        yield done


def _attempt(work: Callable[[], Value]) -> tuple[Value | None, str | None, float]:
    """The work's value, or why there is none, and the seconds it took."""
    start = time.perf_counter()
    value, error = None, None
    try:
        value = work()
    except ErrataError as refused:
        error = str(refused)
    except Exception:  # a bug in one item must not lose the others: it is handed on as text
        error = traceback.format_exc()
    return value, error, time.perf_counter() - start


def _given_up(tries: int, how: str) -> str:
    return (
        f"its worker died {tries} times ({how}). Most often the machine ran out of memory: use "
        "fewer workers, or a smaller model, dtype or batch."
    )


# ------------------------------------------------------------------------------------------- loop


def _in_loop(function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Done[Value]]:
    for index, item in enumerate(items):
        yield Done(index, *_attempt(partial(function, item)))


# -------------------------------------------------------------------------------------- processes


@dataclass
class _Worker:
    """A process at the other end of a pipe; it says hello, then answers each item."""

    number: int
    process: BaseProcess
    connection: Connection
    greeted: bool = False
    index: int | None = None
    """The item it is at."""
    since: float = 0.0

    @classmethod
    def start(cls, number: int, call: bytes, threads: int) -> _Worker:
        context = get_context("spawn")  # a forked torch hangs
        ours, theirs = context.Pipe()
        arguments = (theirs, call, number, threads)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # else its end would never be seen
        return cls(number, process, ours)

    @property
    def idle(self) -> bool:
        return self.greeted and self.index is None

    def give(self, index: int, parcel: bytes) -> None:
        self.index, self.since = index, time.perf_counter()
        with suppress(OSError):  # it is dead, which the next wait tells
            self.connection.send_bytes(parcel)

    def end(self) -> str:
        """Let it go if it is idle, kill it if it still lives; how it ended."""
        self.connection.close()
        if self.idle:
            self.process.join(_PATIENCE)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(connection: Connection, call: bytes, number: int, threads: int) -> None:
    """What a worker does until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends it
    torch.set_num_threads(threads)
    if gpus := _visible_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    with suppress(EOFError, OSError):
        connection.send_bytes(b"")
        while True:
            answer = _attempt(partial(_called, call, connection.recv_bytes()))
            try:
                # Plain pickle: multiprocessing's own would share tensors by file handles, which
                # are lost when a worker dies.
                sent = pickle.dumps(answer)
            except Exception:
                sent = pickle.dumps((None, traceback.format_exc(), answer[2]))
            connection.send_bytes(sent)


def _called(call: bytes, parcel: bytes) -> Any:
    return pickle.loads(call)(pickle.loads(parcel))


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _in_processes(
    call: bytes, parcels: Sequence[bytes], workers: int, tries: int
) -> Iterator[Done[Any]]:
    threads = _threads(workers)
    waiting = deque(range(len(parcels)))
    begun: Counter[int] = Counter()
    left, failed_starts = len(parcels), 0
    pool: list[_Worker] = []
    try:
        for number in range(workers):
            pool.append(_Worker.start(number, call, threads))
        while left:
            told = wait([worker.connection for worker in pool])
            finished: list[Done[Any]] = []
            for worker in [worker for worker in pool if worker.connection in told]:
                try:
                    message = worker.connection.recv_bytes()
                except (EOFError, OSError):  # dead
                    how = worker.end()
                    pool.remove(worker)
                    if (index := worker.index) is not None and begun[index] < tries:
                        waiting.append(index)
                    elif index is not None:
                        seconds = time.perf_counter() - worker.since
                        finished.append(Done(index, None, _given_up(tries, how), seconds))
                    failed_starts += not worker.greeted
                    if failed_starts >= tries:
                        raise ClusterError(
                            f"workers end before they begin ({how}). If this is a script of "
                            'yours, put its work under `if __name__ == "__main__":`.'
                        ) from None
                    if waiting:
                        pool.append(_Worker.start(worker.number, call, threads))
                    continue
                if worker.index is not None:
                    finished.append(Done(worker.index, *pickle.loads(message)))
                worker.greeted, worker.index, failed_starts = True, None, 0
            for worker in pool:
                if worker.idle and waiting:
                    index = waiting.popleft()
                    begun[index] += 1
                    worker.give(index, parcels[index])
            left -= len(finished)
            yield from finished
    finally:
        for worker in pool:
            worker.connection.close()  # all at once, so that nobody waits for another
        for worker in pool:
            worker.end()


# -------------------------------------------------------------------------------------------- ray


def _on_ray(
    function: Callable[[Item], Value],
    items: Sequence[Item],
    workers: int | None,
    address: str | None,
    tries: int,
) -> Iterator[Done[Value]]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
    try:
        _check_answers(address)
        import ray
    except ImportError as error:
        raise ClusterError("work on Ray needs Ray: pip install 'errata[ray]'") from error
    except OSError as error:
        raise ClusterError(f"cannot reach {where}: {error}. Check host and port.") from error
    ours = not ray.is_initialized()
    if ours:
        local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(
                address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({} if address else local),
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(f"cannot reach {where}: {error}") from error
    return _ray_tasks(ray, function, items, workers, tries, ours)


def _check_answers(address: str | None) -> None:
    """Knock at `host:port`: Ray itself would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray_tasks(
    ray: Any,
    function: Callable[[Item], Value],
    items: Sequence[Item],
    workers: int | None,
    tries: int,
    ours: bool,
) -> Iterator[Done[Value]]:
    """Hand out as many tasks as there are workers; Ray does again what died."""
    running: dict[Any, tuple[int, float]] = {}
    try:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        options = {"num_gpus": min(1.0, gpus / workers if workers else gpus)}
        task = ray.remote(num_cpus=1, max_retries=tries - 1, **options)(_ray_task)
        threads = _threads(workers) if ours and workers else None
        waiting = deque(enumerate(items))
        while waiting or running:
            while waiting and len(running) < (workers or len(items)):
                index, item = waiting.popleft()
                running[task.remote(function, item, threads)] = index, time.perf_counter()
            (ref,), _ = ray.wait(list(running))
            index, since = running.pop(ref)
            try:
                done = Done(index, *ray.get(ref))
            except ray.exceptions.RayTaskError as error:  # not unpacked there, or not packed
                done = Done(index, None, str(error), time.perf_counter() - since)
            except ray.exceptions.RayError as error:
                told = _given_up(tries, type(error).__name__)
                done = Done(index, None, told, time.perf_counter() - since)
            yield done
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
        if ours:
            ray.shutdown()


def _ray_task(
    function: Callable[[Item], Value], item: Item, threads: int | None
) -> tuple[Value | None, str | None, float]:
    if threads:
        torch.set_num_threads(threads)
    return _attempt(partial(function, item))
