"""The numbers behind the roles' verdicts, on a synthetic post-activation block (all derived here)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

CHANNELS = 64


def normal_input(seed: int = 0) -> Tensor:
    return torch.randn(64, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, unbiased=False)


def branch(x: Tensor, gamma_last: float) -> Tensor:
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, dtype=torch.float64)
    return gamma_last * normalized(convolution(torch.relu(normalized(x))))


@pytest.mark.parametrize(
    ("gamma", "variance_ratio", "cosine"), [(1.0, 1.47, 0.80), (0.5, 0.367, 0.93), (0.2, 0.059, 0.986), (0.1, 0.015, 0.996)]
)
def test_a_smaller_last_scale_brings_the_block_closer_to_identity(gamma: float, variance_ratio: float, cosine: float) -> None:
    x = torch.relu(normalized(normal_input()))
    x = x * (0.68 / x.var()).sqrt()
    added = branch(x, gamma).detach()

    assert (added.var() / x.var()).item() == pytest.approx(variance_ratio, rel=0.02)
    out = torch.relu(x + added)
    assert (torch.sum(out * x) / (out.norm() * x.norm())).item() == pytest.approx(cosine, abs=0.01)


@pytest.mark.parametrize(("last", "shortcut", "ratio"), [(1.0, 1.0, 1.0), (1.0, 0.2, 25.0), (0.2, 0.2, 1.0)])
def test_the_branch_outweighs_a_shrunken_shortcut(last: float, shortcut: float, ratio: float) -> None:
    x = normal_input()
    projection = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False, dtype=torch.float64)
    on_shortcut = shortcut * normalized(projection(x))

    assert (branch(x, last).var() / on_shortcut.var()).item() == pytest.approx(ratio, rel=1e-9)


class InnerScale(nn.Module):
    """norm with (gamma, beta) -> ReLU -> convolution -> batch norm: the loss ignores a common factor of gamma and beta."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(CHANNELS, dtype=torch.float64) + 0.5)
        self.beta = nn.Parameter(torch.full((CHANNELS,), beta, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, dtype=torch.float64) / 8)
        self.target = torch.randn(256, CHANNELS, dtype=torch.float64)

    def forward(self, x: Tensor, scale_gamma: float = 1.0, scale_beta: float = 1.0) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to the scaled gamma."""
        gamma = (self.gamma * scale_gamma).detach().requires_grad_()
        hidden = torch.relu(gamma * x + self.beta.detach() * scale_beta) @ self.weight
        out = (hidden - hidden.mean(0)) / hidden.std(0, unbiased=False)
        loss = ((out - self.target) ** 2).mean()
        return loss, torch.autograd.grad(loss, gamma)[0]


@pytest.fixture
def features() -> Tensor:
    return torch.randn(256, CHANNELS, dtype=torch.float64)


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_the_loss_ignores_a_common_factor_of_an_inner_scale_and_its_shift(features: Tensor, c: float) -> None:
    block = InnerScale(beta=0.3)
    loss, gradient = block(features)
    scaled_loss, scaled_gradient = block(features, c, c)

    assert scaled_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert (scaled_gradient.norm() * c).item() == pytest.approx(gradient.norm().item(), rel=1e-9)


def test_the_gradient_of_an_inner_scale_is_orthogonal_to_it_without_shift(features: Tensor) -> None:
    block = InnerScale(beta=0.0)
    _, gradient = block(features)

    assert torch.dot(gradient, block.gamma.detach()).item() == pytest.approx(0.0, abs=1e-12 * gradient.norm().item())


def test_with_the_shift_fixed_the_invariance_is_only_approximate(features: Tensor) -> None:
    block = InnerScale(beta=0.3)
    _, gradient = block(features)
    _, scaled = block(features, 2.0, 1.0)

    factor = (scaled.norm() * 2.0 / gradient.norm()).item()
    assert factor != pytest.approx(1.0, rel=1e-3)
    assert 0.8 < factor < 1.35


@pytest.mark.parametrize("gamma", [0.5, 0.2, 0.1])
def test_the_gradient_of_the_last_weight_is_proportional_to_the_last_scale(gamma: float) -> None:
    x, direction = normal_input(), normal_input(1)
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, dtype=torch.float64, requires_grad=True)

    def gradient_norm(scale: float) -> float:
        out = scale * normalized(nn.functional.conv2d(x, weight))
        return torch.autograd.grad((out * direction).sum(), weight)[0].norm().item()

    assert gradient_norm(gamma) == pytest.approx(gamma * gradient_norm(1.0), rel=1e-9)


@pytest.mark.parametrize(("gamma", "ratio"), [(1.0, 2.9), (0.5, 11.7), (0.2, 73.0)])
def test_the_stem_scale_sets_the_variance_the_first_branch_is_added_to(gamma: float, ratio: float) -> None:
    trunk = torch.relu(gamma * normalized(normal_input()))
    added = branch(trunk, 1.0)

    assert (added.var() / trunk.var()).item() == pytest.approx(ratio, rel=0.02)
