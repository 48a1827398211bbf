"""What the page and the rule claim about scales, checked: resizing formulas, and which scale the gradient follows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def formula(size: int, factor: int, align_corners: bool) -> float:
    """1-D variance after linear upsampling of white noise by an integer factor (derived)."""
    if align_corners:
        outputs = factor * size
        if size == 1:
            return 1.0
        period = (outputs - 1) // math.gcd(size - 1, factor - 1)
        return ((outputs - 1) * (2 / 3 + 1 / (3 * period**2)) + 1) / outputs
    inner = 2 / 3 - 1 / (6 * factor**2) if factor % 2 == 0 else 2 / 3 + 1 / (3 * factor**2)
    return inner + (1 - inner) / size


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("factor", [2, 3, 4, 8, 16])
def test_variance_after_upsampling(factor: int, align_corners: bool) -> None:
    """The mean over outputs of the squared interpolation weights, which are the responses to unit impulses."""
    for size in (1, 2, 3, 5, 16, 128):
        impulses = torch.eye(size, dtype=torch.float64)[None]
        weights = F.interpolate(impulses, scale_factor=factor, mode="linear", align_corners=align_corners)
        measured = float(weights.square().sum(1).mean())
        assert measured == pytest.approx(formula(size, factor, align_corners), rel=1e-9)


def gradient_norms(scales: list[float], shifts: list[float], norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Per-branch gradient norm of a 1x1 fusion, std and root mean square; white noise, random targets."""
    torch.manual_seed(0)
    branches = [scale * torch.randn(8, 64, 16, 16) + shift for scale, shift in zip(scales, shifts, strict=True)]
    weight = torch.randn(1024, 64 * len(scales), 1, 1) / 8
    weight.requires_grad_()
    y = F.conv2d(torch.cat(branches, 1), weight)
    if norm:
        y = F.batch_norm(y, None, None, training=True)
    (y * torch.randn(y.shape)).sum().backward()
    assert weight.grad is not None
    norms = torch.stack([part.norm() for part in weight.grad.split(64, 1)])
    return norms, torch.stack([b.std() for b in branches]), torch.stack([b.square().mean().sqrt() for b in branches])


@pytest.mark.parametrize("norm", [True, False])
def test_gradients_follow_the_std_under_batch_norm_and_the_rms_without(norm: bool) -> None:
    norms, stds, rms = gradient_norms([1.0, 0.5, 2.0], [0.5, 1.0, 0.0], norm)
    followed, other = (stds, rms) if norm else (rms, stds)
    torch.testing.assert_close(norms / norms[0], followed / followed[0], rtol=0.03, atol=0)
    assert bool((((norms / norms[0]) / (other / other[0]) - 1).abs() > 0.1).any())
