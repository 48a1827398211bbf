"""The guard's decision, without Lightning."""

from __future__ import annotations

import copy
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.methods.nan_safety.guard import (
    BufferShadow,
    SkipBudget,
    Snapshot,
    Transaction,
    accepts_device_flag,
    gradient_total,
    gradients,
    gradients_are_finite,
    poison,
    steps_once,
)

NAMES = ["Adafactor", "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=4), max_size=4),
    st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=4, max_size=4),
)
def test_a_step_is_finite_when_every_norm_is(values: list[list[float]], dtypes: list[torch.dtype]) -> None:
    grads = [torch.tensor(entries, dtype=torch.float64).to(dtype) for entries, dtype in zip(values, dtypes, strict=False)]
    expected = all(bool(torch.isfinite(gradient.norm())) for gradient in grads)
    assert gradients_are_finite(grads) is expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("position", [0, 777, 4095])
def test_one_entry_is_enough(value: float, position: int) -> None:
    grads = [torch.zeros(3), torch.zeros(64, 64), torch.zeros(())]
    assert gradients_are_finite(grads)
    grads[1].view(-1)[position] = value
    assert not gradients_are_finite(grads)
    assert not torch.isfinite(gradient_total(grads))


def test_sparse_and_mixed_gradients() -> None:
    table, layer = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD([*table.parameters(), *layer.parameters()], lr=0.1)
    layer(table(torch.tensor([1, 3])).double()).sum().backward()
    assert gradients_are_finite(gradients(optimizer))
    assert table.weight.grad is not None
    table.weight.grad._values()[0, 0] = math.nan
    assert not gradients_are_finite(gradients(optimizer))
    assert gradients_are_finite([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_poison_carries_a_bad_loss_with_finite_gradients_into_the_gradients(bad: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = weight.sum() + bad
    poison(loss)
    loss.backward()
    assert weight.grad is not None
    assert bool(weight.grad.isnan().all())


def test_poison_carries_bad_buffers_and_changes_nothing_otherwise() -> None:
    x = torch.randn(5, 3)
    grads = []
    for buffers in (None, [torch.ones(2), torch.tensor([1e30])], [torch.ones(2), torch.tensor([math.nan])]):
        weight = torch.full((3,), 0.3, requires_grad=True)
        loss = (x @ weight).tanh().square().mean()
        if buffers is not None:
            poison(loss, buffers)
        (grads_here,) = torch.autograd.grad(loss, weight)
        grads.append(grads_here)
    assert torch.equal(grads[0], grads[1])
    assert bool(grads[2].isnan().all())
    poison(torch.ones(()))  # a loss without a graph has nothing to poison


def test_clipping_cannot_save_a_step() -> None:
    for value, others in [(math.nan, math.nan), (math.inf, 0.0)]:
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        assert parameters[0].grad is not None
        parameters[0].grad[0] = value
        nn.utils.clip_grad_norm_(parameters, 35.0)
        assert parameters[1].grad is not None
        torch.testing.assert_close(parameters[1].grad, torch.full((2,), others), equal_nan=True)
        assert bool(parameters[0].grad[0].isnan())


@pytest.mark.parametrize("name", NAMES)
def test_steps_once_holds_for_torch_optimizers(name: str) -> None:
    parameter = nn.Parameter(torch.randn(3, 3))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1)
    assert steps_once(optimizer)
    calls = []
    parameter.grad = torch.randn(3, 3)
    optimizer.step(lambda: calls.append(1))
    before = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
    parameter.grad = None
    optimizer.step()
    assert len(calls) == 1
    assert torch.equal(before[0], parameter)
    assert str(before[1]) == str(optimizer.state_dict())


def test_lbfgs_does_not_step_once() -> None:
    assert not steps_once(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize(("name", "options"), [("Adam", {}), ("AdamW", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})])
def test_fused_optimizers_do_nothing_under_the_flag(name: str, options: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, fused=True, weight_decay=0.1, **options)
    assert accepts_device_flag(optimizer) == (name != "SGD")
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert accepts_device_flag(optimizer)
    before = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    parameter.grad = torch.full((4,), math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not accepts_device_flag(getattr(torch.optim, name)([parameter], lr=0.1))


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.norm(x)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_shadow_restores_statistics_and_counters() -> None:
    module = Buffers()
    shadow = BufferShadow(module)
    module(torch.randn(4, 3))
    shadow.accept()
    good = snapshot(module)
    module(torch.full((4, 3), math.inf))
    assert shadow.bad_names() == ["norm.running_mean", "norm.running_var"]
    shadow.restore()
    assert same(good, snapshot(module))
    assert shadow.bad_names() == []


def test_shadow_follows_assigned_buffers_and_changes_from_outside() -> None:
    module = Buffers()
    shadow = BufferShadow(module)
    module.average = torch.ones(2)
    module.average.add_(1)
    shadow.accept_finite()
    module.average.add_(math.nan)
    shadow.accept_finite()
    shadow.restore()
    assert torch.equal(module.average, torch.full((2,), 2.0))


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_settling_on_the_device_equals_accept_and_restore(bad: float) -> None:
    modules = [Buffers(), Buffers()]
    shadows = [BufferShadow(module) for module in modules]
    x = torch.randn(4, 3)
    for module in modules:
        module(x)
    shadows[0].settle(torch.tensor(bad))
    shadows[1].restore() if bad else shadows[1].accept()
    assert same(snapshot(modules[0]), snapshot(modules[1]))
    for module, shadow in zip(modules, shadows, strict=True):
        module(x + 1)
        shadow.restore()
    assert same(snapshot(modules[0]), snapshot(modules[1]))


def test_a_transaction_takes_back_lbfgs() -> None:
    net = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4)
    x, y = torch.randn(8, 3), torch.randn(8, 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = str(optimizer.state_dict()), [p.detach().clone() for p in net.parameters()]
    transaction = Transaction(optimizer)
    optimizer.step(closure)
    assert transaction.holds()
    with torch.no_grad():
        net.weight[0, 0] = math.nan
    assert not transaction.holds()
    transaction.take_back()
    assert before[0] == str(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before[1], net.parameters(), strict=True))


def test_a_snapshot_restores_everything_and_lowers_rates() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    def step() -> None:
        net(torch.randn(4, 2)).square().mean().backward()
        optimizer.step()
        scheduler.step()

    step()
    kept = Snapshot(net, [optimizer], [scheduler])
    values, moments = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for _ in range(3):
        step()
    kept.restore(lr_factor=0.1)
    assert same(values, net.state_dict())
    assert str(moments) == str(optimizer.state_dict()["state"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    step()
    assert scheduler.get_last_lr() == pytest.approx([0.005])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.booleans(), max_size=60), st.integers(0, 4), st.integers(0, 10))
def test_the_budget_counts_rows_and_totals(skips: list[bool], in_a_row: int, per_1000: int) -> None:
    budget = SkipBudget(in_a_row, per_1000)
    for skipped in skips:
        budget.count(skipped=skipped)
    row = len(skips) - max((i + 1 for i, skipped in enumerate(skips) if not skipped), default=0)
    assert (budget.row, budget.skips, budget.steps) == (row, sum(skips), len(skips))
    assert bool(budget.exceeded()) == (row > in_a_row or sum(skips) > per_1000)


def test_the_budget_forgets_after_1000_steps() -> None:
    budget = SkipBudget(per_1000=0)
    budget.count(skipped=True)
    for _ in range(999):
        budget.count(skipped=False)
    assert "1,000" in budget.exceeded()
    budget.count(skipped=False)
    assert budget.exceeded() == ""


def test_sharded_ranks_agree_by_one_flag() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = str(Path(__file__).with_name("sharded_flag.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, script]
    running = [
        subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [out.splitlines()[-1] for out, _ in outputs] == ["[True, True, False]", "[True, False, False]"], outputs[0][1][-2000:]
