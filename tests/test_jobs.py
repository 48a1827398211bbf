"""Jobs in processes, on GPUs and on a Ray cluster: what a lost process, a hanging job or a killed parent costs."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pl_normkit.errors import ConfigError
from pl_normkit.jobs import Failure, open_workers, run_jobs
from tests.lossy_jobs import do

WORDS = ["a", "die", "refuse", "break", "lambda", "die once", "b"]


def results_of(place: str, folder: Path, words: list[str], **options: Any) -> dict[str, Any]:
    with open_workers(place, do, at_once=2) as workers:
        return {job[0]: result for job, result in run_jobs(workers, [(word, str(folder)) for word in words], **options)}


def check(found: dict[str, Any], folder: Path) -> None:
    """A lost process costs its own job, after a second try; every other job has its result."""
    assert sorted(found) == sorted(WORDS)
    for word in ("a", "b", "die once"):
        assert (found[word]["word"], found[word]["folder"]) == (word, str(Path.cwd()))
        assert found[word]["process"] != os.getpid()
    assert (found["die"].is_lost, found["refuse"].is_lost) == (True, False)
    assert isinstance(found["refuse"].error, ConfigError)
    assert found["refuse"].error.where == "there"
    assert found["break"].text == "ValueError: broken"
    assert "lossy_jobs.py" in found["break"].trace
    assert isinstance(found["lambda"], Failure)
    assert "pickle" in found["lambda"].text


def test_a_lost_process_costs_its_own_job(tmp_path: Path) -> None:
    found = results_of("processes", tmp_path, WORDS)
    check(found, tmp_path)
    assert found["die"].text == "the process ended abruptly (signal SIGKILL)"
    assert set(list(found)[-2:]) == {"die", "die once"}  # tried again after all others


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
def test_a_lost_worker_of_a_cluster_costs_its_own_job(tmp_path: Path) -> None:
    """A cluster of two workers on this machine, in a process of its own: Ray warns, and leaves threads behind. The job that kills its
    worker is done by the other one.
    """
    code = (
        "import ray, sys, pathlib; from tests.test_jobs import *\n"
        "ray.init(num_cpus=2, logging_level='ERROR', log_to_driver=False, include_dashboard=False)\n"
        "found = results_of('ray', pathlib.Path(sys.argv[1]), ['a', 'refuse', 'die once', 'lambda', 'b'])\n"
        "assert list(found)[-1] == 'die once', found\n"
        "assert [found[word]['word'] for word in ('a', 'b', 'die once')] == ['a', 'b', 'die once'], found\n"
        "assert {found[word]['folder'] for word in ('a', 'b', 'die once')} == {str(pathlib.Path.cwd())}, found\n"
        "assert found['refuse'].error.where == 'there' and 'pickle' in found['lambda'].text, found\n"
        "print('all is well')"
    )
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240, check=False)
    assert "all is well" in done.stdout, done.stderr


def test_every_gpu_has_a_job_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine says that it has two; which they are is in the variable that the user has set."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with open_workers("gpus", do) as workers:
        assert workers.size == 2
        found = dict(run_jobs(workers, [(str(number), "") for number in range(4)]))
    by_process: dict[int, set[str]] = {}
    for result in found.values():
        by_process.setdefault(result["process"], set()).add(result["gpu"])
    assert sorted(by_process.values(), key=min) == [{"3"}, {"5"}]


def test_a_job_that_hangs_is_given_up(tmp_path: Path) -> None:
    with open_workers("processes", do, at_once=1) as workers:
        ((_, first),) = run_jobs(workers, [("a", "")])
        ((_, given_up),) = run_jobs(workers, [("hang", "")], limit=1.0)
        ((_, then),) = run_jobs(workers, [("b", "")])
    assert given_up.text == "it came to no end within 1 seconds"
    assert then["process"] != first["process"]


def test_no_process_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pl_normkit.jobs import open_workers, run_jobs; from tests.lossy_jobs import do\n"
        "if __name__ == '__main__':\n"
        "    with open_workers('processes', do, at_once=1) as workers:\n"
        "        for job, result in run_jobs(workers, [('a', ''), ('hang', '')]): print(result['process'], flush=True)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [("rays", "did you mean 'ray'"), ("moon", "places: processes, gpus, ray"), ("gpus", "there is no GPU here")],
)
def test_a_place_that_is_not_there(place: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message), open_workers(place, do):
        pass


def test_without_ray_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"a cluster needs Ray\n.*--on ray\n.*pip install ray"), open_workers("ray", do):
        pass
