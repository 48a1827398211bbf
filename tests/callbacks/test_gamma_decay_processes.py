"""Two processes on CPU with gloo. FSDP1 is not among them: torch refuses it without an accelerator."""

from __future__ import annotations

from typing import Any

import pytest

from tests.callbacks.processes import run_on_two_ranks

KINDS = ("ddp", "fsdp2", "fsdp2_late")
WEIGHTS = {"net.stem.0", "net.branch.0", "net.branch.3", "net.shortcut.0", "net.head"}
NORMS = {"net.stem.1", "net.branch.1", "net.branch.4", "net.shortcut.1"}
SCALES_IN_BRANCH = {"net.branch.1.weight", "net.branch.4.weight"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes saw, by kind."""
    return run_on_two_ranks("sharded_runs", tmp_path_factory.mktemp("ranks"), *KINDS)


def decayed(kind: str) -> set[str]:
    weights = {f"{name}.weight" for name in WEIGHTS}
    return weights if kind == "fsdp2_late" else weights | SCALES_IN_BRANCH


@pytest.mark.parametrize("kind", KINDS)
def test_decay_goes_by_role_under(kind: str, runs: list[dict[str, Any]]) -> None:
    everything = {f"{name}.{leaf}" for name in WEIGHTS | NORMS for leaf in ("weight", "bias")}
    expected = {name: 0.1 if name in decayed(kind) else 0.0 for name in everything}

    assert [run[kind].get("error") for run in runs] == [None, None]
    assert [run[kind]["decays"] for run in runs] == [expected, expected]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gamma_norms_are_those_of_the_whole_scale_on_every_rank(kind: str, runs: list[dict[str, Any]]) -> None:
    first, second = (run[kind]["history"] for run in runs)

    assert first == second
    assert {role: points[0] for role, points in first.items()} == {
        "gamma_last": [0, pytest.approx(6**0.5)],
        "gamma_shortcut": [0, pytest.approx(6**0.5)],
        "gamma_branch": [0, pytest.approx(6**0.5)],
        "gamma_trunk": [0, pytest.approx(2.0)],
    }
    by_ddp = runs[0]["ddp"]["history"]
    assert {role: points[-1] for role, points in first.items()} == {role: pytest.approx(by_ddp[role][-1], rel=1e-5) for role in by_ddp}


def test_a_network_built_and_sharded_at_once_is_read_by_type_and_said_so(runs: list[dict[str, Any]]) -> None:
    told = runs[0]["fsdp2_late"]["warnings"]

    assert len(told) == 2
    assert "configure_model both builds and shards the network" in told[0]
    assert "the role of 4 parameters is unknown" in told[1]
    assert [runs[0][kind]["warnings"] for kind in ("ddp", "fsdp2")] == [[], []]
