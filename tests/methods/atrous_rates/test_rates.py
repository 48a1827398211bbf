"""The arithmetic of atrous rates against tables and against convolutions that are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pl_normkit.errors import ConfigError
from pl_normkit.methods.atrous_rates import atrous_rates, valid_tap_share
from pl_normkit.methods.atrous_rates.rates import output_stride
from tests.methods.atrous_rates.networks import CELLS


@pytest.mark.parametrize(("crop", "stride", "c", "r"), [*CELLS, (128, 1, 1 / 6, 21), (256, 1, 1 / 6, 43)])
def test_every_cell_of_the_table(crop: int, stride: int, c: float, r: int) -> None:
    assert atrous_rates(crop, stride, c=c) == (r, 2 * r, 3 * r)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 4, 8, 16, 32]), st.floats(0.01, 3))
def test_no_rate_is_ever_dead(height: int, width: int, stride: int, c: float) -> None:
    side = -(-min(height, width) // stride)
    if side <= 3:
        with pytest.raises(ConfigError, match="no three atrous rates fit"):
            atrous_rates((height, width), stride, c=c)
    else:
        r, _, largest = atrous_rates((height, width), stride, c=c)
        assert 1 <= r <= largest == 3 * r <= side - 1


def test_the_short_side_counts() -> None:
    assert atrous_rates((512, 1024), 16) == atrous_rates((1024, 512), 16) == atrous_rates(512, 16)


@pytest.mark.parametrize(
    ("size", "stride", "c"),
    [
        (0, 8, 0.2),
        ((8,), 8, 0.2),
        ("512", 8, 0.2),
        (512.0, 8, 0.2),
        (True, 8, 0.2),
        (512, 0, 0.2),
        (512, 8.0, 0.2),
        (512, 8, 0),
        (512, 8, None),
    ],
)
def test_bad_arguments(size: Any, stride: Any, c: Any) -> None:
    with pytest.raises(ConfigError):
        atrous_rates(size, stride, c=c)


@pytest.mark.parametrize(
    ("side", "cells", "stride"),
    [(513, 33, 16), (513, 65, 8), (512, 32, 16), (64, 4, 16), (65, 5, 16), (65, 9, 8), (128, 128, 1), (90, 30, 3), (7, 1, 8)],
)
def test_the_stride_of_a_map(side: int, cells: int, stride: int) -> None:
    assert output_stride(side, cells) == stride


# What a rate leaves of a kernel.


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 64), (65, 65), (32, 65)])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 1)])
def test_the_share_of_valid_taps_is_that_of_a_convolution_of_ones(size: tuple[int, int], kernel: tuple[int, int]) -> None:
    ones = torch.ones(1, 1, *size, dtype=torch.float64)
    weight = torch.ones(1, 1, *kernel, dtype=torch.float64) / (kernel[0] * kernel[1])
    for rate in (1, 6, 12, 31, 32, 36):
        padding = tuple(rate * (k - 1) // 2 for k in kernel)
        counted = float(F.conv2d(ones, weight, padding=padding, dilation=rate).mean())
        assert counted == pytest.approx(valid_tap_share(rate, size, kernel), abs=1e-12)


@pytest.mark.parametrize(("side", "rate"), [(32, 36), (32, 32), (32, 31), (8, 7), (8, 8), (8, 1)])
def test_eight_taps_get_no_gradient_exactly_where_the_rate_reaches_the_side(side: int, rate: int) -> None:
    conv = nn.Conv2d(1, 1, 3, padding=rate, dilation=rate, bias=False)
    conv(torch.rand(2, 1, side, side) + 0.5).sum().backward()
    assert conv.weight.grad is not None
    assert int((conv.weight.grad != 0).sum()) == (1 if rate >= side else 9)
