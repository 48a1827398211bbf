"""The guard in plain training loops, without Lightning."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NonFiniteError
from pl_normkit.methods.nan_safety.diagnosis.replay import replay
from pl_normkit.methods.nan_safety.guard.step_guard import StepGuard

DOCS = Path(__file__).parents[4] / "docs" / "nan_safety.md"
BAD = {3: "input", 7: "selection", 8: "input"}


def batch_of(index: int) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(index)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)
    if BAD.get(index) == "input":
        x[3, 1] = math.nan
    return x, y, 0 if BAD.get(index) == "selection" else 8


def train(make: Callable[..., Any], *, closure: bool, drop: bool, scaler: Any = None) -> tuple[list[Tensor], StepGuard]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    optimizer, guard = make(net.parameters()), StepGuard(max_files=0)

    def loss_of(batch: tuple[Tensor, Tensor, int]) -> Tensor:
        x, y, count = batch
        return F.mse_loss(net(x)[:count], y[:count])

    with guard.watching(net, optimizer, step=loss_of, scaler=scaler):
        for index in range(15):
            if drop and index in BAD:
                continue
            batch = batch_of(index)
            guard.begin(batch, index)

            def evaluate(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(batch)
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            if closure:
                optimizer.step(evaluate)
            elif scaler is None:
                evaluate()
                optimizer.step()
            else:
                evaluate()
                scaler.step(optimizer)
                scaler.update()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [*net.state_dict().values(), *state], guard


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize(
    ("optimizer", "closure", "scaled"),
    [("adamw", False, False), ("adamw", True, False), ("sgd", False, False), ("lbfgs", True, False), ("adamw", False, True)],
)
def test_a_plain_loop_ends_as_without_the_bad_batches(optimizer: str, closure: bool, scaled: bool) -> None:
    ends = []
    for drop in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        ends.append(train(OPTIMIZERS[optimizer], closure=closure, drop=drop, scaler=scaler))
    (expected, _), (actual, guard) = ends
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert [event["batch_index"] for event in guard.log.events] == list(BAD)
    assert [event["first"].kind for event in guard.log.events] == ["batch", "forward", "batch"]
    assert [event["samples"] for event in guard.log.events] == [[3], [], [3]]
    assert guard.budget.skips == 3


def test_hooks_and_functions_are_given_back() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    original = torch.autograd.backward
    guard = StepGuard()

    def fail() -> None:
        with guard.watching(net, optimizer):
            assert torch.autograd.backward is not original
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert torch.autograd.backward is original
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ConfigError, match="watches nothing"):
        guard.begin()


def test_a_parameter_that_is_not_finite_ends_a_plain_loop() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=math.nan)
    guard = StepGuard()

    def loop() -> None:
        with guard.watching(net, optimizer):
            for _ in range(3):
                guard.begin()
                net(torch.ones(1, 2)).sum().backward()
                optimizer.step()

    with pytest.raises(NonFiniteError, match="weight is not finite; SGD updates it with lr=nan"):
        loop()
    assert guard.budget.steps == 2


def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    section = DOCS.read_text().split("### Without Lightning")[1]
    code = section.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "2 of 20 steps skipped"
    files = sorted((tmp_path / "nan_guard").iterdir())
    assert len(files) == 2
    assert replay(files[0]).reproduced
    assert "lightning" not in code
