"""Gradient norms, update ratios and dead shares of blocks, against the definitions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from pl_normkit.block_health import HealthMeter, blocks_of
from tests.methods.wiring.setups import classes


def net() -> nn.Sequential:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    return nn.Sequential(body, nn.Linear(16, 4))


def test_numbers_follow_their_definitions() -> None:
    model, x, y = net(), torch.randn(32, 8), classes(32, 4)
    with torch.no_grad():
        model[0][1][0].bias[:4] = -100.0
    before = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    meter = HealthMeter(model)
    loss = F.cross_entropy(model(x), y)
    meter.before_backward(loss)
    loss.backward()
    meter.before_step()
    optimizer.step()
    health = meter.after_step()
    assert list(health) == ["0.0", "0.1", "1"]
    for block, measured in health.items():
        new, old = list(model.get_submodule(block).parameters()), list(before.get_submodule(block).parameters())
        gradient = torch.cat([p.grad.flatten() for p in new if p.grad is not None])
        change, weight = (
            torch.cat([p.detach().flatten() for p in parts]) for parts in ([a - b for a, b in zip(new, old, strict=True)], old)
        )
        assert measured.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert measured.update_ratio == pytest.approx(float(change.norm() / weight.norm()), rel=1e-4)
    dead = (before[0](x) == 0).all(0).float().mean()
    assert health["0.1"].dead_share == pytest.approx(float(dead))
    assert health["1"].dead_share is None


def test_steps_that_are_not_measured_cost_and_keep_nothing() -> None:
    model = net()
    meter = HealthMeter(model)
    model(torch.randn(4, 8)).sum().backward()
    meter.before_step()
    assert (meter.after_step(), meter._before) == ({}, {})


def test_blocks() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    model["head"].bias.requires_grad_(False)
    names = blocks_of(model)
    assert list(dict.fromkeys(names.values())) == ["layers.0", "layers.1", "head"]
    assert "head.bias" not in names
