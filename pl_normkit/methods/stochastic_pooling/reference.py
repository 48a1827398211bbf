"""The eager definition of stochastic average pooling, which is also how it runs on a CPU: no gathers over the data.

Every form is a weighted sum with zero weights outside the subset. Few windows are one batched matrix product; many windows that do not
overlap are torch's own pooling of the weighted map; many overlapping ones are summed offset by offset.
"""

from __future__ import annotations

__all__ = ["pool", "pool_backward", "selection"]

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_normkit.methods.stochastic_pooling.geometry import Windows
from pl_normkit.methods.stochastic_pooling.subset import draw

FEW_WINDOWS = 36


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
    method = _method_for(windows)
    weights = _weights(method, x, windows, seed, rank)
    wide = x.to(weights.dtype)
    out = method.forward(wide, weights, windows)
    if not bool(out.isfinite().all()):
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
    method = _method_for(windows)
    weights = _weights(method, grad, windows, seed, rank)
    wide = grad.to(weights.dtype)
    if bool(wide.isfinite().all()):
        out = method.backward(wide, weights, windows, channels_last)
    else:
        out = _of_selected_only(lambda values: method.backward(values, weights, windows, channels_last), wide)
    return out.to(grad.dtype).contiguous(memory_format=memory_format)


def selection(windows: Windows, seed: Tensor, rank: int, batch: int) -> Tensor:
    """The subsets themselves, for tests and pictures.

    Returns:
        (batch, windows, H * W) bool: which cells of the map each window keeps.
    """
    height, width = windows.map_size
    kept = torch.zeros(batch, len(windows.all) * height * width, dtype=torch.bool)
    for numbers, targets in _targets(windows, "dense"):
        kept[:, targets] = draw(windows, numbers, seed, rank, batch).flatten(1)
    return kept.view(batch, len(windows.all), height * width)


def _format_of(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _of_selected_only(run: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """`run(values)` where a weight of zero must silence infinities and NaN, which a product with zero does not."""
    out = run(values.where(values.isfinite(), 0.0))
    for special, hit in ((torch.inf, values == torch.inf), (-torch.inf, values == -torch.inf), (torch.nan, values.isnan())):
        out = torch.where(run(hit.to(values.dtype)) > 0, out + special, out)
    return out


def _weights(method: _Method, x: Tensor, windows: Windows, seed: Tensor, rank: int) -> Tensor:
    """(N, slots of the method): the weight of each kept cell, zero elsewhere."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch = x.shape[0]
    parts = _targets(windows, method.layout)
    if len(parts) == 1 and parts[0][1] is None:
        return draw(windows, parts[0][0], seed, rank, batch).flatten(1).to(dtype).mul_(windows.all[0].weight)
    weights = torch.zeros(batch, method.slots(windows), dtype=dtype)
    for numbers, targets in parts:
        kept = draw(windows, numbers, seed, rank, batch).flatten(1).to(dtype)
        weights[:, targets] = kept.mul_(windows.all[numbers[0]].weight)
    return weights


@lru_cache(maxsize=256)
def _targets(windows: Windows, layout: str) -> list[tuple[tuple[int, ...], Tensor | None]]:
    """Per class of windows its numbers and the slots that their cells go to; None where that is all slots in order."""
    height, width = windows.map_size
    found: list[tuple[tuple[int, ...], Tensor | None]] = []
    for (rows, columns, above, left), numbers in windows.classes.items():
        row = torch.arange(rows)[:, None]
        column = torch.arange(columns)
        number = torch.tensor(numbers)[:, None, None]
        if layout == "offset":
            kernel_width = windows.spec.size[1]
            slot = ((row + above) * kernel_width + column + left) * len(windows.all) + number
        else:
            corner = torch.tensor([windows.all[i].top * width + windows.all[i].left for i in numbers])[:, None, None]
            slot = corner + row * width + column
            if layout == "dense":
                slot = slot + number * height * width
        found.append((numbers, slot.flatten()))
    if len(windows.all) == 1 and windows.largest == height * width and layout != "offset":
        return [((0,), None)]
    return found


class _Method(Protocol):
    """One way to compute the weighted sum; `layout` says how its weights are indexed."""

    layout: str

    def slots(self, windows: Windows) -> int: ...

    def forward(self, x: Tensor, weights: Tensor, windows: Windows) -> Tensor: ...

    def backward(self, grad: Tensor, weights: Tensor, windows: Windows, channels_last: bool) -> Tensor: ...


class _Dense:
    """All windows at once as a product with a (windows, H * W) matrix per sample."""

    layout = "dense"

    def slots(self, windows: Windows) -> int:
        return len(windows.all) * windows.map_size[0] * windows.map_size[1]

    def forward(self, x: Tensor, weights: Tensor, windows: Windows) -> Tensor:
        batch, channels, height, width = x.shape
        matrix = weights.view(batch, -1, height * width)
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


class _Disjoint:
    """Windows that share no cell: weigh the map, then let torch's pooling sum it."""

    layout = "map"

    def slots(self, windows: Windows) -> int:
        return windows.map_size[0] * windows.map_size[1]

    @staticmethod
    def _arguments(windows: Windows) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool, bool, int]:
        spec = windows.spec
        return spec.size, spec.stride, spec.padding, bool(spec.ceil_mode), True, 1

    def forward(self, x: Tensor, weights: Tensor, windows: Windows) -> Tensor:
        return F.avg_pool2d(x * weights.view(-1, 1, *windows.map_size), *self._arguments(windows))

    def backward(self, grad: Tensor, weights: Tensor, windows: Windows, channels_last: bool) -> Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        like = torch.empty((*grad.shape[:2], *windows.map_size), dtype=grad.dtype).contiguous(memory_format=memory_format)
        spread = torch.ops.aten.avg_pool2d_backward(grad, like, *self._arguments(windows))
        return spread.mul_(weights.view(-1, 1, *windows.map_size))


class _Overlapping:
    """Sliding windows that share cells: one weighted strided slice of the padded map for each offset in the kernel."""

    layout = "offset"

    def slots(self, windows: Windows) -> int:
        return windows.spec.size[0] * windows.spec.size[1] * len(windows.all)

    @staticmethod
    def _margins(windows: Windows) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) cells that make every window of the kernel's full size fit."""
        spec, (rows, columns) = windows.spec, windows.out_size
        right = max(0, (columns - 1) * spec.stride[1] + spec.size[1] - spec.padding[1] - windows.map_size[1])
        bottom = max(0, (rows - 1) * spec.stride[0] + spec.size[0] - spec.padding[0] - windows.map_size[0])
        return spec.padding[1], right, spec.padding[0], bottom

    @staticmethod
    def _slices(padded: Tensor, windows: Windows) -> Iterator[Tensor]:
        (kernel_h, kernel_w), (step_h, step_w), (rows, columns) = windows.spec.size, windows.spec.stride, windows.out_size
        for i in range(kernel_h):
            for j in range(kernel_w):
                yield padded[:, :, i : i + (rows - 1) * step_h + 1 : step_h, j : j + (columns - 1) * step_w + 1 : step_w]

    def forward(self, x: Tensor, weights: Tensor, windows: Windows) -> Tensor:
        planes = weights.view(x.shape[0], -1, *windows.out_size)
        out = x.new_zeros((*x.shape[:2], *windows.out_size)).contiguous(memory_format=_format_of(x))
        for offset, part in enumerate(self._slices(F.pad(x, self._margins(windows)), windows)):
            out.addcmul_(part, planes[:, offset, None])
        return out

    def backward(self, grad: Tensor, weights: Tensor, windows: Windows, channels_last: bool) -> Tensor:
        planes = weights.view(grad.shape[0], -1, *windows.out_size)
        left, right, top, bottom = self._margins(windows)
        height, width = windows.map_size
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        padded = grad.new_zeros((*grad.shape[:2], top + height + bottom, left + width + right)).contiguous(memory_format=memory_format)
        for offset, part in enumerate(self._slices(padded, windows)):
            part.addcmul_(grad, planes[:, offset, None])
        return padded[:, :, top : top + height, left : left + width]


def _method_for(windows: Windows) -> _Method:
    spec = windows.spec
    if spec.adaptive or len(windows.all) <= FEW_WINDOWS:
        return _Dense()
    disjoint = all(stride >= kernel for stride, kernel in zip(spec.stride, spec.size, strict=True))
    return _Disjoint() if disjoint else _Overlapping()
