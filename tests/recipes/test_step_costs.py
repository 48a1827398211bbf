"""What a step costs: bytes counted by hand, and times of steps that follow one another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.recipes import step_costs
from pl_normkit.recipes.step_costs import PeakMemory, StepClock

CPU = torch.device("cpu")
KEPT = torch.zeros(1000)  # 4,000 bytes that are there before


def _three_at_once() -> Tensor:
    made = [torch.ones(250) for _ in range(3)]
    return made[0]


def _one_after_the_other() -> None:
    for _ in range(3):
        torch.ones(250)


BLOCKS: dict[str, tuple[Callable[[], object], int]] = {
    "nothing": (lambda: None, 0),
    "views of what is there": (lambda: KEPT.view(10, 100).T[2:], 0),
    "in place": (lambda: KEPT.add_(0).mul_(1), 0),
    "three at once": (_three_at_once, 3 * 1000),
    "one after the other": (_one_after_the_other, 1000),
    "a sum and what it is of": (lambda: (KEPT + 1) + 1, 2 * 4000),
    "an expanded value is small": (lambda: torch.ones(1).expand(1000), 4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_above_what_was_there(name: str) -> None:
    block, expected = BLOCKS[name]
    with PeakMemory(CPU) as peak:
        block()
    assert peak.bytes == expected


def test_a_step_holds_what_backward_needs() -> None:
    """Squares of n layers keep their inputs until the backward, checkpointed ones do not."""
    x = torch.ones(1000, requires_grad=True)

    def step(times: int) -> None:
        y = x
        for _ in range(times):
            y = y.square()
        y.sum().backward()
        x.grad = None

    found = []
    for times in (4, 8):
        with PeakMemory(CPU) as peak:
            step(times)
        found.append(peak.bytes)
    assert found[1] - found[0] == 4 * x.nbytes


def test_counting_changes_no_result() -> None:
    def step() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = step()
    with PeakMemory(CPU):
        actual = step()
    assert all(map(torch.equal, expected, actual))


def test_the_median_of_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 100.0, 104.0])
    monkeypatch.setattr(step_costs.time, "perf_counter", lambda: next(moments))
    clock = StepClock()
    for pauses in (True, False, False, True, False):
        if pauses:  # a validation took 97 seconds
            clock.pause()
        clock.tick()
    assert clock.seconds == 2.0
