"""Parameters and optimizer state are put back, and torch's optimizers behave as the guard relies on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.methods.nan_safety.guard.undo import Snapshot, Transaction, accepts_device_flag, steps_once

NAMES = ["Adafactor", "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


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
    assert all(torch.equal(values[name], value) for name, value in net.state_dict().items())
    assert str(moments) == str(optimizer.state_dict()["state"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    step()
    assert scheduler.get_last_lr() == pytest.approx([0.005])


def test_a_snapshot_restores_buffers_that_are_other_objects_now() -> None:
    net = nn.Module()
    net.register_buffer("queue", torch.ones(2))
    net.register_buffer("unset", None)
    kept = Snapshot(net, [])
    net.queue = torch.cat([net.queue, torch.full((1,), math.nan)])
    net.unset = torch.ones(3)
    kept.restore()
    assert torch.equal(net.queue, torch.ones(2))
    assert net.unset is None
