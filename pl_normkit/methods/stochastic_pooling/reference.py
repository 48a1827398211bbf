"""The eager definition of stochastic average pooling, which is also how it runs on a CPU.

Small windows of channels-last maps are gathered, see `kept_rows`. Every other form is a weighted sum with zero weights outside the subset:
one batched matrix product where the windows are adaptive or few, a sum over the kernel's offsets otherwise.
"""

from __future__ import annotations

__all__ = ["pool", "pool_backward", "selection"]

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pl_normkit.methods.stochastic_pooling.geometry import Windows
from pl_normkit.methods.stochastic_pooling.kept_rows import pool_rows, spread_rows
from pl_normkit.methods.stochastic_pooling.subset import draw

FEW_WINDOWS = 36
CACHE_BYTES = 2**22
"""What is written to at a time; of 0.5 to 4 MiB the largest was the fastest, as smaller pieces cost more calls than they save."""


def pool(x: Tensor, windows: Windows, seed: Tensor, rank: int) -> Tensor:
    """Training-mode output.

    Args:
        x: (N, C, H, W), contiguous or channels-last.
        windows: the pooling call.
        seed: int64 scalar.
        rank: rank of this process.

    Returns:
        (N, C, out height, out width) in the dtype and memory format of `x`, accumulated in float32 (float64 for float64).
    """
    if x.numel() == 0:
        return x.new_empty((*x.shape[:2], *windows.out_size)).contiguous(memory_format=_format_of(x))
    if windows.is_small and not x.is_contiguous():
        return pool_rows(x.to(_wide(x.dtype)), windows, int(seed), rank).to(x.dtype)
    method = _method_for(windows)
    weights = _weights(method.layout, _wide(x.dtype), windows, int(seed), rank, x.shape[0])
    wide = x.to(weights.dtype)
    out = method.forward(wide, weights, windows)
    if not out.sum().isfinite():
        out = _of_selected_only(lambda values: method.forward(values, weights, windows), wide)
    return out.to(x.dtype).contiguous(memory_format=_format_of(x))


def pool_backward(grad: Tensor, windows: Windows, seed: Tensor, rank: int, channels_last: bool) -> Tensor:
    """Gradient of `pool` with respect to its input.

    Args:
        grad: (N, C, out height, out width).
        windows: the pooling call.
        seed: the seed of the forward pass.
        rank: the rank of the forward pass.
        channels_last: memory format of the result.

    Returns:
        (N, C, H, W).
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad = grad.contiguous(memory_format=memory_format)
    if grad.numel() == 0:
        return grad.new_zeros((*grad.shape[:2], *windows.map_size)).contiguous(memory_format=memory_format)
    if windows.is_small and channels_last:
        return spread_rows(grad.to(_wide(grad.dtype)), windows, int(seed), rank).to(grad.dtype)
    method = _method_for(windows)
    weights = _weights(method.layout, _wide(grad.dtype), windows, int(seed), rank, grad.shape[0])
    wide = grad.to(weights.dtype)
    if wide.sum().isfinite():
        out = method.backward(wide, weights, windows, channels_last)
    else:
        out = _of_selected_only(lambda values: method.backward(values, weights, windows, channels_last), wide)
    return out.to(grad.dtype).contiguous(memory_format=memory_format)


def selection(windows: Windows, seed: Tensor, rank: int, batch: int) -> Tensor:
    """The subsets themselves, for tests and pictures.

    Returns:
        (batch, windows, H * W) bool: which cells of the map each window keeps.
    """
    shape = (batch, len(windows.all), windows.map_size[0] * windows.map_size[1])
    return _weights("dense", torch.float32, windows, int(seed), rank, batch).view(shape) > 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _format_of(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _of_selected_only(run: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """`run(values)` where a weight of zero must silence infinities and NaN, which a product with zero does not."""
    out = run(values.where(values.isfinite(), 0.0))
    for special, hit in ((torch.inf, values == torch.inf), (-torch.inf, values == -torch.inf), (torch.nan, values.isnan())):
        out = torch.where(run(hit.to(values.dtype)) > 0, out + special, out)
    return out


@lru_cache(maxsize=16)
def _weights(layout: str, dtype: torch.dtype, windows: Windows, seed: int, rank: int, batch: int) -> Tensor:
    """(N, slots of the layout): the weight of each kept cell, zero elsewhere. The last few are kept for the backward pass."""
    parts, slots = _parts(windows, layout, dtype)
    weights = None
    for part in parts:
        kept = draw(windows, part.numbers, seed, rank, batch).flatten(1)
        values = (kept if part.cells is None else kept[:, part.cells]) * part.weights
        if part.slots is None:
            return values
        if weights is None:
            weights = torch.zeros(batch, slots, dtype=dtype)
        weights[:, part.slots] = values
    return torch.zeros(batch, slots, dtype=dtype) if weights is None else weights


class _Part(NamedTuple):
    """Windows that are drawn together.

    Attributes:
        numbers: which.
        cells: places of real cells in the flattened draw, None where every place is one.
        slots: where each of them goes, None where that is all slots in order.
        weights: of each of them.
    """

    numbers: tuple[int, ...]
    cells: Tensor | None
    slots: Tensor | None
    weights: Tensor


@lru_cache(maxsize=256)
def _parts(windows: Windows, layout: str, dtype: torch.dtype) -> tuple[list[_Part], int]:
    """How draws turn into weights, and the number of slots."""
    slots = len(windows.all) * (_slots_per_window(windows, layout))
    if windows.is_small and windows.all:
        groups = [tuple(range(len(windows.all)))]
    else:
        groups = list(windows.classes.values())
    return [_part(windows, layout, dtype, numbers, slots) for numbers in groups], slots


def _slots_per_window(windows: Windows, layout: str) -> int:
    height, width = windows.map_size
    kernel_h, kernel_w = windows.spec.size
    return {"dense": height * width, "offset": kernel_h * kernel_w}[layout]


def _part(windows: Windows, layout: str, dtype: torch.dtype, numbers: tuple[int, ...], slots: int) -> _Part:
    most = max(windows.all[number].cells for number in numbers)
    cells, targets, weights = [], [], []
    for place, number in enumerate(numbers):
        window = windows.all[number]
        cell = torch.arange(window.cells)
        cells.append(cell + place * most)
        targets.append(_slots_of(windows, layout, number, cell // window.width, cell % window.width))
        weights.append(torch.full((window.cells,), window.weight, dtype=dtype))
    places, target = torch.cat(cells), torch.cat(targets)
    all_real = len(places) == most * len(numbers)
    in_order = len(target) == slots and bool((target == torch.arange(slots)).all())
    return _Part(numbers, None if all_real else places, None if in_order else target, torch.cat(weights))


def _slots_of(windows: Windows, layout: str, number: int, row: Tensor, column: Tensor) -> Tensor:
    window = windows.all[number]
    if layout == "offset":
        above = windows.vertical.before[number // windows.out_size[1]]
        left = windows.horizontal.before[number % windows.out_size[1]]
        return ((row + above) * windows.spec.size[1] + column + left) * len(windows.all) + number
    height, width = windows.map_size
    return (number * height + window.top + row) * width + window.left + column


class _Method(Protocol):
    """One way to compute the weighted sum; `layout` says how its weights are indexed."""

    layout: str

    def forward(self, x: Tensor, weights: Tensor, windows: Windows) -> Tensor: ...

    def backward(self, grad: Tensor, weights: Tensor, windows: Windows, channels_last: bool) -> Tensor: ...


class _Dense:
    """All windows at once as a product with a (windows, H * W) matrix per sample."""

    layout = "dense"

    def forward(self, x: Tensor, weights: Tensor, windows: Windows) -> Tensor:
        batch, channels, height, width = x.shape
        matrix = weights.view(batch, -1, height * width)
        if x.is_contiguous() and len(windows.all) == 1:
            return torch.bmm(matrix, x.view(batch, channels, -1).mT).view(batch, channels, 1, 1)
        if x.is_contiguous():
            return torch.bmm(x.view(batch, channels, -1), matrix.mT).view(batch, channels, *windows.out_size)
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        return torch.bmm(matrix, rows).view(batch, *windows.out_size, channels).permute(0, 3, 1, 2)

    def backward(self, grad: Tensor, weights: Tensor, windows: Windows, channels_last: bool) -> Tensor:
        batch, channels = grad.shape[:2]
        matrix = weights.view(batch, len(windows.all), -1)
        if channels_last:
            rows = grad.permute(0, 2, 3, 1).reshape(batch, len(windows.all), channels)
            out = matrix.mT * rows if len(windows.all) == 1 else torch.bmm(matrix.mT, rows)
            return out.view(batch, *windows.map_size, channels).permute(0, 3, 1, 2)
        columns = grad.reshape(batch, channels, len(windows.all))
        out = columns * matrix if len(windows.all) == 1 else torch.bmm(columns, matrix)
        return out.view(batch, channels, *windows.map_size)


class _ByOffset:
    """Sliding windows: one weighted strided slice of the padded map for each offset in the kernel.

    Samples are taken a few at a time, so that what the offsets add to stays in the cache.
    """

    layout = "offset"

    @staticmethod
    def _pairs(maps: Tensor, outputs: Tensor, planes: Tensor, windows: Windows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each offset in the kernel: the cells at it, the outputs whose window has a real cell there, and their weights."""
        spec, out_size = windows.spec, windows.out_size
        for i in range(spec.size[0]):
            cells_v, outputs_v = _reach(i - spec.padding[0], spec.stride[0], windows.map_size[0], out_size[0])
            for j in range(spec.size[1]):
                cells_h, outputs_h = _reach(j - spec.padding[1], spec.stride[1], windows.map_size[1], out_size[1])
                offset = i * spec.size[1] + j
                plane = planes[:, offset, None, outputs_v, outputs_h]
                yield maps[:, :, cells_v, cells_h], outputs[:, :, outputs_v, outputs_h], plane

    def forward(self, x: Tensor, weights: Tensor, windows: Windows) -> Tensor:
        planes = weights.view(x.shape[0], -1, *windows.out_size)
        out = torch.empty((*x.shape[:2], *windows.out_size), dtype=x.dtype, memory_format=_format_of(x))
        for some in _samples_in_cache(out):
            out[some].zero_()
            for cells, outputs, plane in self._pairs(x[some], out[some], planes[some], windows):
                outputs.addcmul_(cells, plane)
        return out

    def backward(self, grad: Tensor, weights: Tensor, windows: Windows, channels_last: bool) -> Tensor:
        planes = weights.view(grad.shape[0], -1, *windows.out_size)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty((*grad.shape[:2], *windows.map_size), dtype=grad.dtype, memory_format=memory_format)
        disjoint = windows.overlap == (1, 1)
        tiled = disjoint and windows.spec.stride == windows.spec.size and windows.spec.padding == (0, 0)
        bottom, right = (windows.out_size[axis] * windows.spec.size[axis] if tiled else 0 for axis in (0, 1))
        for some in _samples_in_cache(out):
            out[some, :, bottom:].zero_()
            out[some, :, :bottom, right:].zero_()
            for cells, outputs, plane in self._pairs(out[some], grad[some], planes[some], windows):
                if disjoint:
                    torch.mul(outputs, plane, out=cells)
                else:
                    cells.addcmul_(outputs, plane)
        return out


def _samples_in_cache(maps: Tensor) -> Iterator[slice]:
    """Slices of the batch that hold at most `CACHE_BYTES` each, or one sample."""
    batch = maps.shape[0]
    step = max(1, CACHE_BYTES * batch // (maps.numel() * maps.element_size()))
    return (slice(first, first + step) for first in range(0, batch, step))


def _reach(offset: int, step: int, length: int, count: int) -> tuple[slice, slice]:
    """Cells `offset + step * i` that lie on an axis of `length`, and the outputs i, of `count`, that they belong to."""
    first = max(0, -(offset // step))
    last = min(count, (length - 1 - offset) // step + 1)
    begin = offset + step * first
    return slice(begin, max(begin, begin + step * (last - first - 1) + 1), step), slice(first, max(first, last))


def _method_for(windows: Windows) -> _Method:
    if windows.spec.adaptive or len(windows.all) <= FEW_WINDOWS:
        return _Dense()
    return _ByOffset()
