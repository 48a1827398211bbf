"""The gradient's variance ratio through group norms: the derived tables, and what a measurement leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import convert_to_group_norm, measure_isometry
from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.methods.group_count.measure import NormIsometry


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _linear(inputs: int, outputs: int, scale: float = 1.0) -> tuple[nn.Sequential, Tensor]:
    """ReLU of normal values, an iid linear layer, a norm."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(inputs))
    return nn.Sequential(nn.ReLU(), layer, nn.GroupNorm(1, outputs)), torch.randn(512, inputs)


def _whole_ratio(model: nn.Sequential, x: Tensor, groups: int) -> float:
    """The ratio per element from the norm's output to the layer's input y_prev before the ReLU, by backpropagation through all of it."""
    norm = model[2]
    norm.num_groups = groups
    x = x.clone().requires_grad_()
    y = model(x)
    gradient = torch.randn_like(y)
    (behind,) = torch.autograd.grad(y, x, gradient)
    return float(behind.square().mean() / gradient.square().mean())


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "published"),
    [(256, 256, 64, 1.008), (256, 256, 16, 1.069), (256, 256, 8, 1.191), (256, 256, 4, 1.99), (256, 128, 4, 1.012)],
)
def test_linear_layers(inputs: int, outputs: int, size: int, published: float) -> None:
    """The formula, the probe and a backward pass through the whole layer agree; the Jacobian alone (.50 at 256 -> 256, 4) is excluded."""
    model, x = _linear(inputs, outputs)
    (norm,) = measure_isometry(model, x, groups=[outputs // size]).norms
    formula = outputs / inputs * (size - 2) / (size - 3)

    assert norm.fan_ratio * norm.predicted[0] == pytest.approx(formula)
    assert norm.fan_ratio * norm.random[0] == pytest.approx(published, rel=0.04)
    if size > 4:  # at 4 the ratio's variance is infinite: another gradient gives another value
        assert _whole_ratio(model, x, outputs // size) == pytest.approx(norm.fan_ratio * norm.random[0], rel=0.05)


def test_the_scale_of_the_weights_cancels() -> None:
    ratios = []
    for scale in (0.1, 1.0, 10.0):
        torch.manual_seed(1)
        (norm,) = measure_isometry(*_linear(64, 64, scale), groups=[4, 8]).norms
        ratios.append(norm.random)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    assert ratios[2] == pytest.approx(ratios[1], rel=1e-4)


@pytest.fixture(scope="module")
def conv() -> NormIsometry:
    """ReLU of normal values with no offset of the channels (c = 1 / pi), a convolution, a norm of 64 channels."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False)
    nn.init.normal_(layer.weight)
    model = nn.Sequential(nn.ReLU(), layer, nn.GroupNorm(1, 64))
    (norm,) = measure_isometry(model, torch.randn(16, 64, 16, 16)).norms
    return norm


@pytest.mark.parametrize(("size", "iid", "constant"), [(64, 1.00, None), (8, 1.07, 0.90), (4, 1.13, 0.82), (2, 1.24, 0.57), (1, 1.48, 0.0)])
def test_convolutions(conv: NormIsometry, size: int, iid: float, constant: float | None) -> None:
    index = conv.counts.index(64 // size)
    assert conv.mean_share == pytest.approx(1 / math.pi, abs=0.03)
    assert conv.random[index] == pytest.approx(iid, rel=0.05)
    assert conv.predicted[index] == pytest.approx(1 / (1 - conv.mean_share / size))
    if constant is not None:
        assert conv.constant[index] == pytest.approx(constant, abs=0.05)
        assert conv.predicted_constant[index] == pytest.approx((1 - 1 / size) / (1 - conv.mean_share / size))
    if size == 1:
        assert conv.constant[index] < 1e-9


def test_every_divisor_is_tried_and_strides_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.GroupNorm(3, 6))
    batch, group = measure_isometry(model, torch.randn(4, 3, 9, 9)).norms
    assert (batch.module, batch.groups, batch.counts, batch.fan_ratio) == ("1", 0, (1, 2, 3, 4, 6, 12), 12 / (4 * 3))
    assert (group.module, group.groups, group.counts, group.fan_ratio) == ("4", 3, (1, 2, 3, 6), 0.5)


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_isometry(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_report(tmp_path: Path) -> None:
    found = measure_isometry(nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6)), torch.randn(8, 4))
    (row,) = json.loads(found.to_json())
    assert (row["module"], row["counts"], row["constant"], row["mean_share"]) == ("1", [1, 2, 3, 6], [], None)
    assert "is 1 or C" in str(found)
    found.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_bad_input() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4))
    with pytest.raises(ConfigError):
        measure_isometry(model, torch.randn(2, 4), groups=[0])
    with pytest.raises(NothingMatchedError):
        measure_isometry(nn.Linear(4, 4), torch.randn(2, 4))


def test_a_converted_network_is_measured_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    convert_to_group_norm(model, 4)
    (norm,) = measure_isometry(model, torch.randn(2, 3, 8, 8)).norms
    assert norm.groups == 4


def test_a_norm_that_is_called_by_keyword_and_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(self.norm(self.conv(x))))

    assert [norm.module for norm in measure_isometry(Twice(), torch.randn(2, 4, 3, 3)).norms] == ["norm", "norm"]
