"""Small windows of channels-last maps on a CPU: a cell is a row of memory, so only the kept ones are read, as bags of an embedding.

`torch.embedding_bag` sums rows by index with weights. Forward, a bag is a window and its rows are its kept cells; backward, a bag is a cell
and its rows are the gradients of the windows that kept it, so that each gradient is written once and an empty bag is a zero.
"""

from __future__ import annotations

__all__ = ["pool_rows", "spread_rows"]

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pl_normkit.methods.stochastic_pooling.geometry import Windows
from pl_normkit.methods.stochastic_pooling.subset import draw


def pool_rows(x: Tensor, windows: Windows, seed: int, rank: int) -> Tensor:
    """`reference.pool` of a channels-last `x` in float32 or float64, for `windows.is_small`."""
    batch, channels = x.shape[:2]
    bags = _bags(windows, batch)
    cells = _kept_cells(windows, seed, rank, batch)
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    out = _weighted_bags(rows, cells, bags.offsets, bags.weights)
    return out.view(batch, *windows.out_size, channels).permute(0, 3, 1, 2)


def spread_rows(grad: Tensor, windows: Windows, seed: int, rank: int) -> Tensor:
    """`reference.pool_backward` of a channels-last `grad`; the result is channels-last."""
    batch, channels = grad.shape[:2]
    height, width = windows.map_size
    bags = _bags(windows, batch)
    cells = _kept_cells(windows, seed, rank, batch)
    order = cells.argsort(stable=True)
    offsets = torch.zeros(batch * height * width + 1, dtype=torch.int64)
    torch.cumsum(cells.bincount(minlength=batch * height * width), 0, out=offsets[1:])
    rows = grad.permute(0, 2, 3, 1).reshape(-1, channels)
    out = _weighted_bags(rows, bags.windows[order], offsets, bags.weights[order])
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _weighted_bags(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = torch.embedding_bag(rows, indices, offsets, False, 0, False, weights.to(rows.dtype), True)[0]
    return out


class _Bags(NamedTuple):
    """What does not depend on the draw; kept cells are listed window by window, sample by sample.

    Attributes:
        cells: (N, windows, most cells) flattened: the row of each cell of each window.
        offsets: where each window's kept cells begin, and the end.
        windows: the window of each kept cell, over all samples.
        weights: the weight of each kept cell, float64.
    """

    cells: Tensor
    offsets: Tensor
    windows: Tensor
    weights: Tensor


@lru_cache(maxsize=64)
def _bags(windows: Windows, batch: int) -> _Bags:
    height, width = windows.map_size
    cells = torch.zeros(len(windows.all), windows.largest, dtype=torch.int64)
    for number, window in enumerate(windows.all):
        cell = torch.arange(window.cells)
        cells[number, : window.cells] = (window.top + cell // window.width) * width + window.left + cell % window.width
    first = torch.arange(batch)[:, None, None] * (height * width)
    kept = torch.tensor([window.kept for window in windows.all]).repeat(batch)
    weights = torch.tensor([window.weight for window in windows.all], dtype=torch.float64).repeat(batch)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return _Bags((first + cells).flatten(), offsets, torch.arange(len(kept)).repeat_interleave(kept), weights.repeat_interleave(kept))


@lru_cache(maxsize=16)
def _kept_cells(windows: Windows, seed: int, rank: int, batch: int) -> Tensor:
    """Rows of the kept cells. The last few draws are kept for the backward pass."""
    kept = draw(windows, tuple(range(len(windows.all))), seed, rank, batch)
    return _bags(windows, batch).cells[kept.flatten()]
