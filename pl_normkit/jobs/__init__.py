"""Many jobs at once, of which one that loses its process costs itself alone.

They run in processes of this machine, on its GPUs (one job each), or on a Ray cluster.

    __init__.py  opens workers, hands jobs to them, and tries again what lost its process
    attempt.py   one job, whatever it raises
    local.py     processes of this machine
    cluster.py   a Ray cluster
"""

from __future__ import annotations

__all__ = ["PLACES", "Failure", "open_workers", "run_jobs"]

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

from pl_normkit.errors import ConfigError, nearest
from pl_normkit.jobs.attempt import Failure

PLACES = ("processes", "gpus", "ray")


class Workers(Protocol):
    """Where jobs run. A result is what the work returned, or a `Failure`."""

    size: int

    def start(self, number: int, job: Any) -> None:
        """Hand over a job; there are never more than `size` at a time."""

    def finished(self, seconds: float | None) -> list[tuple[int, Any]]:
        """Numbers and results of jobs that have ended; waits for one, `seconds` at most."""

    def stop(self, number: int) -> None:
        """End a job that runs; it has no result."""

    def close(self) -> None:
        """End everything."""


@contextmanager
def open_workers(
    place: str,
    work: Callable[[Any], Any],
    *,
    at_once: int | None = None,
    is_heavy: bool = False,
    setup: Callable[[], None] | None = None,
    imports: Sequence[str] = (),
) -> Iterator[Workers]:
    """Workers that do `work`, ended with the block.

    Args:
        place: "processes", "gpus" or "ray".
        work: from a job to its result; it, the jobs and the results can be pickled.
        at_once: how many jobs at a time; by default one a core, a GPU, or what the cluster has.
        is_heavy: whether a job wants a GPU for itself where a cluster has some, and the cores that fall to it.
        setup: called first in each new process.
        imports: modules that all processes of this machine need, and that may be imported once for all of them.

    Raises ConfigError for a place that does not exist or is not there.
    """
    if place not in PLACES:
        raise ConfigError(
            f"there is no place {place!r} to run at", where="--on", fix=nearest(place, PLACES) or f"places: {', '.join(PLACES)}"
        )
    workers = _workers(place, work, at_once, is_heavy, setup, imports)
    try:
        yield workers
    finally:
        workers.close()


def _workers(
    place: str,
    work: Callable[[Any], Any],
    at_once: int | None,
    is_heavy: bool,
    setup: Callable[[], None] | None,
    imports: Sequence[str],
) -> Workers:
    if place == "ray":
        from pl_normkit.jobs.cluster import RayWorkers

        return RayWorkers(work, at_once, is_heavy, setup)
    from pl_normkit.jobs.local import LocalWorkers, visible_gpus, warm_up

    cores = os.cpu_count() or 1
    environments: list[dict[str, str]] = [{}] * (at_once or cores)
    if place == "gpus":
        environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible_gpus()][:at_once]
        if not environments:
            raise ConfigError("there is no GPU here", where="--on gpus", fix="take --on processes")
    is_warm = bool(imports) and place == "processes"
    if is_warm:
        warm_up(imports)
    return LocalWorkers(work, environments, max(cores // len(environments), 1) if is_heavy else 1, setup, is_warm)


def run_jobs(workers: Workers, jobs: Iterable[Any], *, limit: float | None = None) -> Iterator[tuple[Any, Any]]:
    """Each job with its result or `Failure`, as they come in.

    A job that lost its process is tried once more, after all others and alone: what killed it may have been too many at once.

    Args:
        workers: as from `open_workers`.
        jobs: taken one by one as workers become free, so that results so far may decide what is still to be done.
        limit: seconds after which a job is ended.
    """
    lost = []
    for job, result in _run(workers, jobs, workers.size, limit):
        if isinstance(result, Failure) and result.is_lost:
            lost.append(job)
        else:
            yield job, result
    yield from _run(workers, lost, 1, limit)


def _run(workers: Workers, jobs: Iterable[Any], at_once: int, limit: float | None) -> Iterator[tuple[Any, Any]]:
    waiting = enumerate(jobs)
    running: dict[int, tuple[Any, float]] = {}
    while True:
        for number, job in islice(waiting, at_once - len(running)):
            running[number] = (job, time.monotonic())
            workers.start(number, job)
        if not running:
            return
        for number, result in workers.finished(None if limit is None else max(_oldest(running) + limit - time.monotonic(), 0.0)):
            yield running.pop(number)[0], result
        for number in [number for number, (_, began) in running.items() if limit is not None and time.monotonic() - began >= limit]:
            workers.stop(number)
            yield running.pop(number)[0], Failure(f"it came to no end within {limit:g} seconds")


def _oldest(running: Mapping[int, tuple[Any, float]]) -> float:
    return min(began for _, began in running.values())
