"""Which input cells each output of a pooling layer averages, and how many of them stochastic pooling keeps."""

from __future__ import annotations

__all__ = ["SMALL_WINDOW", "Axis", "PoolSpec", "Window", "Windows", "output_size", "subset_size", "windows_of"]

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

SMALL_WINDOW = 32


class PoolSpec(NamedTuple):
    """A pooling layer in two dimensions, all integers, so that it travels through an operator's arguments.

    Attributes:
        adaptive: 1 for bins of an adaptive pool, 0 for a sliding window.
        size: output size (-1 keeps the input's) where adaptive, kernel size otherwise; (height, width).
        stride: of the sliding window.
        padding: cells added on each side; they are never drawn.
        ceil_mode: 1 rounds the output size up.
        count_include_pad: 1 divides by the padded window, as torch does.
        divisor: torch's divisor_override, 0 for none.
    """

    adaptive: int
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    ceil_mode: int = 0
    count_include_pad: int = 1
    divisor: int = 0

    def encode(self) -> list[int]:
        return [self.adaptive, *self.size, *self.stride, *self.padding, self.ceil_mode, self.count_include_pad, self.divisor]

    @classmethod
    def decode(cls, numbers: list[int]) -> PoolSpec:
        adaptive, kh, kw, sh, sw, ph, pw, ceil_mode, include, divisor = numbers
        return cls(adaptive, (kh, kw), (sh, sw), (ph, pw), ceil_mode, include, divisor)


def output_size(spec: PoolSpec, length: int, axis: int) -> int:
    """Output cells along one axis (0 height, 1 width) for `length` input cells, as torch counts them."""
    if spec.adaptive:
        return length if spec.size[axis] < 0 else spec.size[axis]
    kernel, stride, padding = spec.size[axis], spec.stride[axis], spec.padding[axis]
    cells = (length + 2 * padding - kernel + (stride - 1 if spec.ceil_mode else 0)) // stride + 1
    if spec.ceil_mode and (cells - 1) * stride >= length + padding:
        cells -= 1
    return cells


class Axis(NamedTuple):
    """Windows along one axis: first cell, number of real cells, cells with padding, and padded cells before the first."""

    start: tuple[int, ...]
    length: tuple[int, ...]
    extent: tuple[int, ...]
    before: tuple[int, ...]


def _axis(spec: PoolSpec, length: int, axis: int) -> Axis:
    count = output_size(spec, length, axis)
    if spec.adaptive:
        start = [i * length // count for i in range(count)]
        lengths = [-((i + 1) * length // -count) - start[i] for i in range(count)]
        return Axis(tuple(start), tuple(lengths), tuple(lengths), (0,) * count)
    kernel, stride, padding = spec.size[axis], spec.stride[axis], spec.padding[axis]
    raw = [i * stride - padding for i in range(count)]
    ends = [min(first + kernel, length + padding) for first in raw]
    start = [max(first, 0) for first in raw]
    lengths = [min(end, length) - first for first, end in zip(start, ends, strict=True)]
    extent = [end - first for first, end in zip(raw, ends, strict=True)]
    before = [first - raw_first for first, raw_first in zip(start, raw, strict=True)]
    return Axis(tuple(start), tuple(lengths), tuple(extent), tuple(before))


def subset_size(cells: int, keep: float) -> int:
    """Elements kept of a window of `cells`: max(1, round(keep * cells)), never more than the window holds."""
    return min(cells, max(1, round(keep * cells)))


@lru_cache(maxsize=4096)
def _network_shape(cells: int) -> tuple[int, int, int]:
    """Rows and columns of the permutation's grid, and how many grid cells lie outside the window.

    The least waste among grids less than twice as long as wide, because long grids mix slowly (measured); the squarest of equals.
    """
    best = (cells, 0, 0)
    for rows in range(1, math.isqrt(cells) + 2):
        columns = -(cells // -rows)
        if columns < 2 * rows:
            best = min(best, (rows * columns - cells, -rows, columns))
    waste, negative_rows, columns = best
    return -negative_rows, columns, waste


class Window(NamedTuple):
    """One output's window: real cells (a rectangle), subset size, permutation grid, the weight of each kept cell, and cells / divisor."""

    top: int
    left: int
    height: int
    width: int
    kept: int
    rows: int
    columns: int
    waste: int
    weight: float
    padding_factor: float

    @property
    def cells(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Windows:
    """All windows of one pooling call on maps of one size.

    Attributes:
        spec: the pooling layer.
        map_size: (height, width) of the input.
        keep: keep probability.
        scale: factor on every output.
        sqrt_scale: whether each output is also multiplied by sqrt(kept / cells) of its own window.
    """

    spec: PoolSpec
    map_size: tuple[int, int]
    keep: float
    scale: float = 1.0
    sqrt_scale: bool = True

    @cached_property
    def vertical(self) -> Axis:
        return _axis(self.spec, self.map_size[0], 0)

    @cached_property
    def horizontal(self) -> Axis:
        return _axis(self.spec, self.map_size[1], 1)

    @property
    def out_size(self) -> tuple[int, int]:
        return len(self.vertical.start), len(self.horizontal.start)

    @cached_property
    def all(self) -> tuple[Window, ...]:
        """Windows in row-major order of the output."""
        rows, columns = range(self.out_size[0]), range(self.out_size[1])
        return tuple(self._window(row, column) for row in rows for column in columns)

    def _window(self, row: int, column: int) -> Window:
        height, width = self.vertical.length[row], self.horizontal.length[column]
        cells = height * width
        kept = subset_size(cells, self.keep)
        divisor = cells
        if not self.spec.adaptive and self.spec.count_include_pad:
            divisor = self.vertical.extent[row] * self.horizontal.extent[column]
        divisor = self.spec.divisor or divisor
        factor = self.scale * (math.sqrt(kept / cells) if self.sqrt_scale else 1.0)
        place = (self.vertical.start[row], self.horizontal.start[column], height, width)
        return Window(*place, kept, *_network_shape(cells), factor * cells / (kept * divisor), cells / divisor)

    @cached_property
    def classes(self) -> dict[tuple[int, int, int, int], tuple[int, ...]]:
        """Window numbers by (height, width, top padding, left padding); all windows of a class draw from the same number of cells."""
        found: dict[tuple[int, int, int, int], list[int]] = {}
        columns = self.out_size[1]
        for number, window in enumerate(self.all):
            padded = (self.vertical.before[number // columns], self.horizontal.before[number % columns])
            found.setdefault((window.height, window.width, *padded), []).append(number)
        return {key: tuple(numbers) for key, numbers in found.items()}

    @cached_property
    def largest(self) -> int:
        """Cells of the largest window."""
        return max((window.cells for window in self.all), default=0)

    @property
    def is_small(self) -> bool:
        """Whether subsets are drawn one cell after the other instead of through a permutation."""
        return self.largest <= SMALL_WINDOW

    @cached_property
    def keeps_all(self) -> bool:
        """Whether every window keeps all of its cells, so that the pool is torch's own up to `scale`."""
        return all(window.kept == window.cells for window in self.all)

    @cached_property
    def overlap(self) -> tuple[int, int]:
        """The most windows any cell lies in, along (height, width)."""
        return _most_covering(self.vertical, self.map_size[0]), _most_covering(self.horizontal, self.map_size[1])


def covering(axis: Axis, length: int) -> list[tuple[int, int]]:
    """For each cell along an axis the first window that holds it and how many do; windows are in order."""
    found = []
    for cell in range(length):
        holding = [i for i, (first, size) in enumerate(zip(axis.start, axis.length, strict=True)) if first <= cell < first + size]
        found.append((holding[0], len(holding)) if holding else (0, 0))
    return found


def _most_covering(axis: Axis, length: int) -> int:
    return max((count for _, count in covering(axis, length)), default=0)


@lru_cache(maxsize=1024)
def windows_of(spec: PoolSpec, map_size: tuple[int, int], keep: float, scale: float = 1.0, sqrt_scale: bool = True) -> Windows:
    """The windows of a pooling call; equal arguments share one object and what it has worked out."""
    return Windows(spec, map_size, keep, scale, sqrt_scale)
