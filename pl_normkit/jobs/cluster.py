"""A Ray cluster: the one that RAY_ADDRESS names or that runs here, else one of this machine alone for as long as the jobs take."""

from __future__ import annotations

__all__ = ["RayWorkers"]

import os
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pl_normkit.errors import ConfigError
from pl_normkit.jobs.attempt import Failure, attempt, failure_of


class RayWorkers:
    """Jobs as tasks of a cluster; its nodes have the same packages, and the working directory at the same path.

    Raises ConfigError where Ray is not installed, or its cluster does not answer.
    """

    def __init__(self, work: Callable[[Any], Any], at_once: int | None, is_heavy: bool, setup: Callable[[], None] | None = None) -> None:
        self._ray = _import_ray()
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray)
        resources = self._ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)) if is_heavy else 0, int(resources.get("CPU", 1))
        self.size = at_once or gpus or max(cores, 1)
        needs = {"num_cpus": max(cores // self.size, 1) if is_heavy else 1, "num_gpus": int(bool(gpus))}
        # Tried again by us, after all others: Ray would do it at once.
        self._task = self._ray.remote(max_retries=0, **needs)(_attempt_there)
        self._where, self._work = (list(sys.path), str(Path.cwd())), pickle.dumps((work, setup))
        self._running: dict[Any, int] = {}

    def start(self, number: int, job: Any) -> None:
        self._running[self._task.remote(*self._where, self._work, pickle.dumps(job))] = number

    def finished(self, seconds: float | None) -> list[tuple[int, Any]]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [(self._running.pop(reference), self._result(reference)) for reference in ready]

    def stop(self, number: int) -> None:
        reference = next(reference for reference, of in self._running.items() if of == number)
        del self._running[reference]
        self._ray.cancel(reference, force=True)

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._is_ours:
            self._ray.shutdown()

    def _result(self, reference: Any) -> Any:
        try:
            return pickle.loads(self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:  # our own code failed there, such as an import
            return failure_of(error)
        except self._ray.exceptions.RayError as error:
            return Failure(f"its worker was lost ({type(error).__name__})", is_lost=True)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we begin tells nobody
    os.environ.setdefault("RAY_worker_niceness", "0")  # its workers go as fast as our own processes would
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what a task without a GPU sees stays as it is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError as error:
        raise ConfigError("a cluster needs Ray", where="--on ray", fix="pip install ray, on every node") from error
    return ray


def _connect(ray: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        evidence, address = str(error).splitlines()[:1], os.environ.get("RAY_ADDRESS", "")
        raise ConfigError("the Ray cluster does not answer", where=f"RAY_ADDRESS={address}", evidence="".join(evidence)) from error


def _attempt_there(path: Sequence[str], folder: str, work: bytes, job: bytes) -> bytes:
    """In a worker of the cluster, which may be on another machine."""
    sys.path += [entry for entry in path if entry not in sys.path]
    if Path(folder).is_dir():
        os.chdir(folder)
    do, setup = pickle.loads(work)
    if setup is not None:
        setup()
    result = attempt(do, pickle.loads(job))
    try:
        return pickle.dumps(result)
    except Exception as error:  # it cannot be pickled
        return pickle.dumps(failure_of(error))
