"""Steps in 2 processes; NaN, infinities and overflow strike inputs, activations, losses, gradients, buffers, selections, single ranks.

python -m tests.callbacks.test_nan_storm     the long storms: more than 500 faults, in a few minutes
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks import nan_storm
from tests.callbacks.nan_storm import plan

SCRIPT = Path(__file__).with_name("nan_storm.py")
STEPS = 200
SHARE = 0.25


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, name: str, *, world: int = 2, expect: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Run the storm in `world` processes; the facts each rank wrote."""
    shared = {"folder": str(folder), "name": name, "world": world, "port": free_port(), "steps": STEPS, "planned": STEPS, "share": SHARE}
    shared |= options
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(shared | {"rank": rank})], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    messages = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [expect] * world, messages[0][-3000:]
    return [] if expect else [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(world)]


def run_here(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """The storm in this process, on one rank."""
    nan_storm.main({"folder": str(folder), "name": name, "world": 1, "rank": 0, "steps": 300, "planned": STEPS, "share": SHARE} | options)
    facts: dict[str, Any] = json.loads((folder / f"{name}0.json").read_text())
    return facts


def state(folder: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    saved = torch.load(folder / f"{name}{rank}.pt", weights_only=True)
    moments = {f"{index}.{key}": value for index, entry in saved["optimizer"].items() for key, value in entry.items()}
    return {**saved["model"], **moments}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], without: tuple[str, ...] = ()) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name]) and name not in without] == []


STATISTICS = ("net.norm.running_mean", "net.norm.running_var", "net.average")
EXPECTED = {  # site -> kind and place of the first producer
    "input": ("batch", "batch['x']"),
    "activation": ("forward", "net"),
    "loss": ("forward", ""),
    "gradient": ("backward", "net"),
    "statistics": ("buffer", "net.norm.running_mean"),
    "overflow": ("buffer", "net.norm.running_var"),
    "selection": ("forward", ""),
    "average": ("buffer", "net.average"),
}


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("storm")
    return folder, run(folder, "guarded", guard="nan_guard", drop=False, logger=True)


def test_nothing_is_ever_non_finite_and_every_event_is_reported(storm: tuple[Path, list[dict[str, Any]]]) -> None:
    harm = plan(STEPS, 2, SHARE)
    assert {entry["site"] for entry in harm.values()} == set(EXPECTED)
    for facts in storm[1]:
        assert facts["first_bad"] is None
        assert facts["error"] == ""
        assert [event["batch"] for event in facts["events"]] == list(harm)
        assert facts["skips"] == len(harm)
        for event, wanted in zip(facts["events"], harm.values(), strict=True):
            assert (event["kind"], event["module"]) == EXPECTED[wanted["site"]], (event, wanted)
            assert event["ranks"] == ([0, 1] if wanted["rank"] == -1 else [wanted["rank"]])
        assert len(facts["files"]) == 10
        assert {Path(file).parent for file in facts["files"]} == {storm[0] / "guarded" / "version_0" / "nan_guard"}


def test_ranks_stay_bit_equal(storm: tuple[Path, list[dict[str, Any]]]) -> None:
    # running statistics belong to each rank until DDP broadcasts those of rank 0 before the next forward
    assert_equal(state(storm[0], "guarded", 0), state(storm[0], "guarded", 1), without=STATISTICS)


def test_the_trajectory_equals_a_run_without_those_batches(storm: tuple[Path, list[dict[str, Any]]]) -> None:
    run(storm[0], "clean", guard="none", drop=True)
    for rank in (0, 1):
        assert_equal(state(storm[0], "clean", rank), state(storm[0], "guarded", rank))


def test_sharded_parameters_stay_finite_and_follow_the_run_without_those_batches(tmp_path: Path) -> None:
    """FSDP2: no rank sees all gradients; flag and norm are those of all shards, finite spikes of one rank too; nothing is diagnosed."""
    short: dict[str, Any] = {"sharded": True, "steps": 80, "share": 0.3, "spikes": [59, 72]}
    facts = run(tmp_path, "guarded", guard="nan_guard", drop=False, arguments={"spike_factor": 50}, **short)
    run(tmp_path, "clean", guard="none", drop=True, **short)
    struck = [harm["site"] for step, harm in plan(STEPS, 2, short["share"]).items() if step < short["steps"]]
    assert set(struck) == set(nan_storm.SITES)
    for rank in (0, 1):
        assert (facts[rank]["first_bad"], facts[rank]["error"]) == (None, "")
        kinds = [event["kind"] for event in facts[rank]["events"]]
        assert sorted(kinds) == ["spike"] * 2 + ["unknown"] * len(struck)
        assert (facts[rank]["spikes"], facts[rank]["skips"]) == (2, len(struck))
        assert_equal(state(tmp_path, "clean", rank), state(tmp_path, "guarded", rank))
    assert state(tmp_path, "guarded", 0)["net.first.weight"].shape == (6, 6)  # half of the rows


def test_decisions_left_on_the_device_are_those_of_all_ranks(tmp_path: Path) -> None:
    short: dict[str, Any] = {"fused": True, "steps": 60, "share": 0.3}
    facts = run(tmp_path, "guarded", guard="nan_guard", drop=False, arguments={"device_side": True}, **short)
    struck = [step for step in plan(STEPS, 2, short["share"]) if step < short["steps"]]
    for rank in (0, 1):
        assert (facts[rank]["skips"], facts[rank]["first_bad"], facts[rank]["error"]) == (len(struck), None, "")
    assert_equal(state(tmp_path, "guarded", 0), state(tmp_path, "guarded", 1), without=STATISTICS)
    assert facts[0]["events"] == facts[1]["events"]


def check_windows(folder: Path, name: str, share: float, **options: Any) -> int:
    """Windows of three micro-batches: each that holds a fault is skipped on both ranks. Returns the number of faults."""
    facts = run(folder, name, guard="nan_guard", drop=False, accumulate=3, share=share, **options)
    steps = options.get("steps", STEPS) // 3 * 3
    harm = [step for step in plan(options.get("planned", STEPS), 2, share) if step < steps]
    for rank in (0, 1):
        assert (facts[rank]["first_bad"], facts[rank]["error"]) == (None, "")
        assert facts[rank]["skips"] == len({step // 3 for step in harm})
    assert_equal(state(folder, name, 0), state(folder, name, 1), without=STATISTICS)
    return len(harm)


def test_faults_in_micro_batches_without_a_logger(tmp_path: Path) -> None:
    assert check_windows(tmp_path, "windows", 0.1, steps=150) > 5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("guard", "error"), [("spike", "TrainingSpikeException"), ("early", "")])
def test_lightnings_own_checks_act_after_the_weights_are_nan(guard: str, error: str, tmp_path: Path) -> None:
    facts = run_here(tmp_path, guard, guard=guard, drop=False)
    assert facts["first_bad"] == min(plan(STEPS, 1, SHARE))
    assert facts["error"] == error


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_killed_run_resumes_bit_equal(tmp_path: Path) -> None:
    die_at = random.SystemRandom().randrange(51, 300)
    print(f"killed at step {die_at}")  # pytest shows it when the test fails
    last = tmp_path / f"stepstep={(die_at - 1) // 50 * 50}.ckpt"
    whole = run_here(tmp_path, "whole", guard="nan_guard", drop=False)
    run(tmp_path, "killed", world=1, expect=-9, guard="nan_guard", drop=False, steps=300, die_at=die_at, checkpoint_every=50)
    resumed = run_here(tmp_path, "resumed", guard="nan_guard", drop=False, checkpoint_every=50, resume=str(last))
    assert_equal(state(tmp_path, "whole", 0), state(tmp_path, "resumed", 0))
    assert whole["skips"] == resumed["skips"] == sum(step < 300 for step in plan(STEPS, 1, SHARE))


def long_storms() -> None:
    """Print how many faults there were in all; any that slips through fails an assertion."""
    total = 0
    for index, (share, logger) in enumerate([(0.4, True), (0.6, False)]):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size: dict[str, Any] = {"steps": 500, "planned": 500, "share": share}
            facts = run(folder, "guarded", guard="nan_guard", drop=False, logger=logger, **size)
            run(folder, "clean", guard="none", drop=True, **size)
            harm = plan(500, 2, share)
            for rank in (0, 1):
                assert (facts[rank]["first_bad"], facts[rank]["error"], facts[rank]["skips"]) == (None, "", len(harm))
                assert [event["batch"] for event in facts[rank]["events"]] == list(harm)
                assert_equal(state(folder, "clean", rank), state(folder, "guarded", rank))
            windows = check_windows(folder, "windows", share / 3, steps=300, planned=300)
            print(f"storm {index}: {len(harm)} faults in 500 steps, {windows} in 300 micro-batches; weights as in the run without them")
            total += len(harm) + windows
    print(f"{total} faults, none slipped through, no rank waited for another")


if __name__ == "__main__":
    long_storms()
