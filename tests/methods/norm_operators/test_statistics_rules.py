"""NK941 fires where evaluation differs from training by its running statistics, and is quiet once these are measured."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pl_normkit import audit, recalibrate_batch_norm
from pl_normkit.rules import load_rules


def batches(scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 32, 32, generator=generator) * scale, torch.zeros(16)) for _ in range(3)]


def trained(momentum: float, steps: int = 1, scale: float = 5.0) -> nn.Module:
    """A ResNet after some training forwards."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    with torch.no_grad():
        for _ in range(steps):
            for x, _ in batches(scale):
                model.train()(x)
    return model


def is_found(model: nn.Module, data: list[Any], **options: Any) -> bool:
    return bool(audit(model, loaders=(data, None), select=["NK941"], **options).findings)


def gap(model: nn.Module, x: Tensor) -> float:
    """How far evaluation is from training on a batch, of the outputs of training."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        train = model.train()(x)
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        return float((model.eval()(x) - train).norm() / train.norm())


@pytest.mark.parametrize(("momentum", "steps"), [(0.001, 1), (0.5, 5)])
def test_it_fires_where_evaluation_is_far_from_training(momentum: float, steps: int) -> None:
    model, (x, _) = trained(momentum, steps), batches(5.0)[0]
    assert is_found(model, batches(5.0)) is (gap(model, x) > 0.5)
    recalibrate_batch_norm(model, batches(5.0))
    assert gap(model, x) < 0.5
    assert not is_found(model, batches(5.0))


def test_a_model_that_was_never_trained_is_left_alone_and_nothing_moves() -> None:
    assert not is_found(timm.create_model("resnet10t", num_classes=3), batches())
    model = trained(0.001)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert is_found(model, batches(5.0))
    assert not is_found(model, batches(5.0), measure=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_linter_and_remedy_agree() -> None:
    model = trained(0.001)
    data = batches(5.0)
    report = audit(model, data[0][0], loaders=(data, None), select=["NK941"])
    fix = load_rules()["NK941"].fix
    assert fix is not None
    changes = fix(model, torch.cat([x for x, _ in data]))
    (finding,) = report.findings
    assert {place.module for place in finding.places} <= {change.module for change in changes.made}
    assert not is_found(model, data)
