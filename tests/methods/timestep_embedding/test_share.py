"""The formula against group norms that run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pl_normkit.methods.timestep_embedding import surviving_share


@pytest.mark.parametrize(
    ("channels", "groups", "kept"), [(64, 32, 0.5), (128, 32, 0.75), (256, 32, 0.875), (64, 1, 63 / 64), (64, 64, 0.0)]
)
def test_small_offsets_keep_one_minus_groups_over_channels(channels: int, groups: int, kept: float) -> None:
    assert surviving_share(channels, groups, 1e-6, 1.0) == pytest.approx(kept * 1e-6, rel=1e-5)


@pytest.mark.parametrize("static", [0.0, 0.04])
@pytest.mark.parametrize("groups", [1, 8, 16, 32])
def test_it_is_within_a_tenth_of_what_a_group_norm_does(groups: int, static: float) -> None:
    """Offsets of .3 standard deviations. Half the mean square of the difference of two independent times is the variance due to time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, 6, 6, generator=generator) + static**0.5 * torch.randn(256, 64, 1, 1, generator=generator)
    first, second = (F.group_norm(x + 0.3 * torch.randn(256, 64, 1, 1, generator=generator), groups) for _ in range(2))
    measured = ((first - second).square().mean() / 2 / first.var()).item()
    # the spatial means of 36 independent values vary a little by themselves
    assert surviving_share(64, groups, 0.09, 35 / 36, static + 1 / 36) == pytest.approx(measured, rel=0.1)


@given(st.integers(1, 6), st.floats(0, 10), st.floats(0.01, 10), st.floats(0, 10))
def test_it_is_a_share_and_falls_with_the_groups(power: int, time: float, space: float, static: float) -> None:
    shares = [surviving_share(2**power, 2**count, time, space, static) for count in range(power + 1)]
    assert shares == sorted(shares, reverse=True)
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] == 0
