"""Modules for networks of one's own: they bring a time past norms that take offsets away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.methods.timestep_embedding.modules import PositionalPlane, position_pattern
from pl_normkit.nn import FiLMNorm, PositionalTimeEmbedding, TimeAfterNorm


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_the_pattern_has_mean_zero_and_variance_one(size: list[int]) -> None:
    pattern = position_pattern(size, torch.zeros(()))
    assert pattern.shape == tuple(size)
    assert pattern.mean().item() == pytest.approx(0, abs=1e-6)
    assert pattern.square().mean().item() == pytest.approx(float(max(size) > 1), abs=1e-5)


def test_planes_alone_are_multiplied() -> None:
    x = torch.randn(2, 4, 5, 6)
    expected = x.clone()
    expected[:, 1:3] *= position_pattern((5, 6), x)
    torch.testing.assert_close(PositionalPlane(1, 3)(x), expected)


class Positional(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.embed = norm, PositionalTimeEmbedding(16, 8)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(x + self.embed(embedding, x))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8), nn.BatchNorm2d(8), nn.GroupNorm(8, 8)], ids=["instance", "batch", "group"])
@pytest.mark.parametrize("kind", [Positional, lambda norm: TimeAfterNorm(norm, 16, 8), lambda norm: FiLMNorm(norm, 16, 8)])
def test_a_shared_time_survives(kind: type[nn.Module], norm: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = kind(norm), torch.randn(4, 8, 6, 6)
    first, second = (model(x, torch.randn(1, 16).expand(4, 16)) for _ in range(2))
    assert ((first - second).square().mean() / first.var()).item() > 1e-3
