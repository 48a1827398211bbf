"""Processes of this machine: as many as there are environments, each taking one job after the other."""

from __future__ import annotations

__all__ = ["LocalWorkers", "visible_gpus", "warm_up"]

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from pl_normkit.jobs.attempt import Failure, attempt, failure_of

_SPAWN = multiprocessing.get_context("spawn")  # a fork of a process that has threads, or has used a GPU, breaks


def warm_up(modules: Sequence[str]) -> None:
    """Begin to import `modules` in a process beside this one, of which workers are then forks: they are imported once for all of them.

    Elsewhere than on Linux, where forks are not safe in all libraries, and once it has begun, nothing happens.
    """
    if sys.platform == "linux":
        multiprocessing.set_forkserver_preload(list(modules))
        forkserver.ensure_running()


def _context(is_warm: bool) -> Any:
    return multiprocessing.get_context("forkserver") if is_warm and sys.platform == "linux" else _SPAWN


def visible_gpus() -> list[str]:
    """What to write into CUDA_VISIBLE_DEVICES for each GPU that this process may use."""
    import torch

    count, named = torch.cuda.device_count(), [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[:count] if named != [""] else [str(index) for index in range(count)]


class LocalWorkers:
    """A process for each environment, begun when it gets its first job, and anew after it was lost.

    Args:
        work: from a job to its result.
        environments: variables that each process has beside ours.
        threads: of torch in each process.
        setup: called first in each process.
        is_warm: whether they are forks of the process that `warm_up` has begun, in place of new ones.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        environments: Sequence[Mapping[str, str]],
        threads: int,
        setup: Callable[[], None] | None = None,
        is_warm: bool = False,
    ) -> None:
        self.size = len(environments)
        self._work = (work, setup)
        self._idle = [_Worker({**_threads(threads), **environment}, _context(is_warm)) for environment in environments]
        self._busy: dict[int, _Worker] = {}

    def start(self, number: int, job: Any) -> None:
        worker = self._idle.pop(0)
        self._busy[number] = worker
        worker.give(self._work, job)

    def finished(self, seconds: float | None) -> list[tuple[int, Any]]:
        ready = set(wait([worker.answers for worker in self._busy.values()], seconds))
        done = [(number, worker.take()) for number, worker in self._busy.items() if worker.answers in ready]
        for number, _ in done:
            self._idle.append(self._busy.pop(number))
        return done

    def stop(self, number: int) -> None:
        worker = self._busy.pop(number)
        worker.end()
        self._idle.append(worker)

    def close(self) -> None:
        for worker in (*self._idle, *self._busy.values()):
            worker.end()


def _threads(count: int) -> dict[str, str]:
    """Variables that keep torch to so many threads, or to fewer where the user says so."""
    return {name: "1" if os.environ.get(name) == "1" else str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, environment: Mapping[str, str], context: Any) -> None:
        self._environment, self._context = dict(environment), context
        self._process: Any = None
        self.answers: Connection

    def give(self, work: Any, job: Any) -> None:
        if self._process is None or not self._process.is_alive():
            self.end()
            self.answers, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs, self._environment, list(sys.path)), daemon=False)
            self._process.start()
            theirs.close()  # so that its end is seen here
            self.answers.send(work)
        self.answers.send(job)

    def take(self) -> Any:
        try:
            return self.answers.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self.end()
            return Failure(f"the process ended abruptly ({how})", is_lost=True)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.answers.close()
            self._process = None


def _serve(questions: Connection, environment: Mapping[str, str], path: Sequence[str]) -> None:
    """Answer jobs until the pipe is closed. The environment is set before anything that may read it is imported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interrupt key is for our parent, who ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    sys.path[:] = path
    try:
        work = _prepared(questions)
        while True:
            _answer(questions, attempt(work, questions.recv()))
    except EOFError:
        return


def _prepared(questions: Connection) -> Callable[[Any], Any]:
    """The work, which may name code that is not there: every job then says so."""
    try:
        work, setup = questions.recv()
        if "torch" in sys.modules:  # of a fork, which has read no variable
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if setup is not None:
            setup()
    except EOFError:
        raise
    except Exception as error:
        failure = failure_of(error)
        return lambda _: failure
    prepared: Callable[[Any], Any] = work
    return prepared


def _answer(questions: Connection, result: Any) -> None:
    try:
        questions.send(result)
    except OSError:
        raise
    except Exception as error:  # it cannot be pickled
        questions.send(failure_of(error))


def _end_with_parent() -> None:
    """A parent that was killed closes nothing; a long job would go on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
