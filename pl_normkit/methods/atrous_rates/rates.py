"""The arithmetic of atrous rates: which triple suits a feature map, and what of a kernel a rate leaves alive."""

from __future__ import annotations

__all__ = ["CENTRE", "COVERAGE", "atrous_rates", "check_size", "feature_side", "fitted_rates", "output_stride", "valid_tap_share"]

import math

from pl_normkit.errors import ConfigError

CENTRE = 1 / 6
"""c at which the star of the centre pixel just reaches the border (derived)."""
COVERAGE = 0.22
"""c that brings the taps of all pixels nearest to all places of the map, for long-range tasks (derived)."""


def atrous_rates(input_size: int | tuple[int, int], output_stride: int, *, c: float = CENTRE) -> tuple[int, int, int]:
    """The triple (r, 2r, 3r) for a training crop: r = clamp(round(c * N), 1, (N - 1) // 3), N = ceil(short side / output stride).

    Every rate is below N, so no branch reads padding alone. The short side of a crop that is not square counts.

    Args:
        input_size: height and width of the training crop in pixels, or its side.
        output_stride: input pixels per cell of the feature map that ASPP reads.
        c: share of the map's side; 1/6 lets the star of the centre pixel just reach the border, 0.22 suits long-range tasks.

    Raises:
        ConfigError: for a size, stride or c that is not positive, and for N <= 3, where no three live rates exist.

    Source: derived here; the paper's own formula is not known to us.

    >>> atrous_rates(512, output_stride=16)
    (5, 10, 15)
    """
    if isinstance(output_stride, bool) or not isinstance(output_stride, int) or output_stride < 1:
        raise ConfigError("the output stride must be a positive whole number", evidence=repr(output_stride))
    return fitted_rates(feature_side(input_size, output_stride), c)


def feature_side(input_size: int | tuple[int, int], output_stride: int) -> int:
    """Short side of the feature map, in cells."""
    return math.ceil(min(check_size(input_size)) / output_stride)


def fitted_rates(side: int, c: float = CENTRE) -> tuple[int, int, int]:
    """The triple for a feature map whose short side is `side` cells. Raises ConfigError as `atrous_rates` does."""
    if not isinstance(c, (int, float)) or not 0 < c < math.inf:
        raise ConfigError("c must be a positive number", evidence=repr(c), fix="use 1/6, or 0.22 for long-range tasks")
    if side <= 3:
        raise ConfigError(
            "no three atrous rates fit the feature map",
            evidence=f"its short side is {side} cell{'s' if side != 1 else ''}, and rates r, 2r, 3r must all be smaller",
            fix="train on larger crops or at a smaller output stride, or give rates=",
        )
    r = max(1, min(round(c * side), (side - 1) // 3))
    return r, 2 * r, 3 * r


def check_size(input_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an input size. Raises ConfigError."""
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    raise ConfigError("the input size is no size in pixels", evidence=repr(input_size), fix="write 512 or (512, 1024)")


def output_stride(input_side: int, feature_cells: int) -> int:
    """Input pixels per cell, from the sides of an input and of a feature map.

    The power of two that gives such a map, else the nearest stride. A stride s gives ceil(side / s) cells under the usual
    padding, so 513 pixels in 33 cells are stride 16.
    """
    powers = [1 << k for k in range(input_side.bit_length() + 1) if math.ceil(input_side / (1 << k)) == feature_cells]
    if powers:
        return powers[0]
    return max(1, round(input_side / feature_cells))


def valid_tap_share(rate: int, size: int | tuple[int, int], kernel: tuple[int, int] = (3, 3)) -> float:
    """Share of the taps of a kernel of dilation `rate` that read no padding, mean over a map of `size` cells.

    For a 3x3 kernel on N x N cells: ((1 + 2 max(0, 1 - d/N)) / 3)^2, which is 1/9 where d >= N, since the centre alone is left.
    Source: derived here, exact.

    >>> round(valid_tap_share(36, 32), 4), round(valid_tap_share(5, 32), 4)
    (0.1111, 0.8025)
    """
    shares = [
        (1 + 2 * sum(max(0.0, 1 - tap * rate / side) for tap in range(1, length // 2 + 1))) / length
        for side, length in zip(check_size(size), kernel, strict=True)
    ]
    return shares[0] * shares[1]
