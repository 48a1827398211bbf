"""Streaming moments against numpy's two-pass answer, also where E[x^2] - E[x]^2 fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_normkit.methods.fusion_scale.moments import Moments


def merged(parts: list[torch.Tensor]) -> Moments:
    moments = Moments.empty(parts[0].shape[1])
    for part in parts:
        moments = moments.merge(Moments.of(part))
    return moments


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(-1e3, 1e3),
    st.floats(0.1, 100),
    st.integers(0, 2**31),
)
def test_merged_batches_are_the_whole(sizes: list[int], channels: int, mean: float, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [mean + std * torch.randn(size, channels, 3, 2, generator=generator, dtype=torch.float64) for size in sizes]
    whole = torch.cat(parts)
    moments = merged(parts)

    torch.testing.assert_close(moments.mean, whole.mean((0, 2, 3)), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(moments.std, whole.var((0, 2, 3), correction=0).sqrt(), rtol=1e-9, atol=1e-9)
    pooled = moments.pooled([channels])
    torch.testing.assert_close(pooled.mean, whole.mean()[None], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(pooled.std, whole.var(correction=0).sqrt()[None], rtol=1e-9, atol=1e-9)


def test_a_large_mean_costs_no_digits() -> None:
    """In float32 the difference of E[x^2] and E[x]^2 would have no correct digit here."""
    x = 3000 + torch.randn(8, 2, 32, 32) * 0.5
    expected = x.double().var((0, 2, 3), correction=0).sqrt()
    by_difference = ((x**2).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2).abs().sqrt().double()

    assert bool(((by_difference / expected - 1).abs() > 0.1).any())
    torch.testing.assert_close(merged(list(x.split(2))).std, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened(dtype: torch.dtype) -> None:
    x = (100 * torch.rand(4, 3, 16, 16) + 200).to(dtype)
    torch.testing.assert_close(Moments.of(x).std, x.double().var((0, 2, 3), correction=0).sqrt(), rtol=1e-5, atol=0)


def test_branches_are_pooled_in_the_order_of_their_channels() -> None:
    x = torch.cat([torch.full((2, 1, 2, 2), 1.0), torch.full((2, 2, 2, 2), 4.0)], 1)
    x[:, 2] = 6
    pooled = Moments.of(x).pooled([1, 2])
    assert pooled.mean.tolist() == [1.0, 5.0]
    assert pooled.std.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 2, 768, 768), (2, 37, 128, 128)])
def test_large_maps_and_many_channels_cost_no_digits(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """More than one chunk of centred values; the last one holds fewer channels."""
    x = (torch.randn(shape) + torch.arange(shape[1])[:, None, None]).relu().to(memory_format=memory_format)
    torch.testing.assert_close(Moments.of(x).std, x.double().var((0, 2, 3), correction=0).sqrt(), rtol=1e-5, atol=0)
