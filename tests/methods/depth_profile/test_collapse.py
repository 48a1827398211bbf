"""Collapsed attention is an alarm only together with a spike."""

from __future__ import annotations

import math

import pytest
import torch

from pl_normkit.methods.depth_profile import EntropyCollapse

STEADY = [(step, 2.0) for step in range(0, 100, 10)]
SPIKE = [*STEADY, (100, 4.1)]

CASES: dict[str, tuple[list[tuple[int, float]], list[tuple[int, float]], list[bool]]] = {
    "a fall and a spike": (SPIKE, [(50, 0.6), (100, 0.29)], [False, True]),
    "a fall of less than half": (SPIKE, [(50, 0.6), (100, 0.31)], [False, False]),
    "low and a spike": (SPIKE, [(100, 0.04)], [True]),
    "a fall alone": (STEADY, [(50, 0.6), (100, 0.29)], [False, False]),
    "a fall over more than 100 steps": (SPIKE, [(50, 0.6), (151, 0.29)], [False, False]),
    "long after the spike": (SPIKE, [(150, 0.6), (201, 0.29)], [False, False]),
    "not finite": ([(0, math.nan)], [(10, 0.04)], [True]),
    "a spike among too few": ([(0, 1.0), (1, 9.0)], [(10, 0.04)], [False]),
    "twice the median, no more": ([*STEADY, (100, 4.0)], [(100, 0.04)], [False]),
}


@pytest.mark.parametrize("case", CASES)
def test_alarm(case: str) -> None:
    values, entropies, expected = CASES[case]
    watch = EntropyCollapse()
    for step, value in values:
        watch.add_value("loss", value, step)
    assert [watch.add_entropies({"block": entropy, "other": 0.5}, step) for step, entropy in entropies] == [
        ["block"] if is_alarm else [] for is_alarm in expected
    ]


def test_what_a_step_gives() -> None:
    """A tensor, or one under "loss"; anything else is no reading."""
    watch = EntropyCollapse()
    for step, output in enumerate([torch.tensor(1.0), {"loss": torch.tensor(1.0)}, None, torch.ones(2), 3.0, *[torch.tensor(1.0)] * 2]):
        watch.add_output(output, step)
    watch.add_output(torch.tensor(9.0), 7)
    assert watch.add_entropies({"block": 0.01}, 8) == []  # four readings before it are too few
    watch.add_output({"loss": torch.tensor(9.0)}, 9)
    assert watch.add_entropies({"block": 0.01}, 10) == ["block"]
