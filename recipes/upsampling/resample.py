"""Coarse maps made of fine ones, the way back, and numbers where a sensor gave none."""

from __future__ import annotations

__all__ = ["Reduction", "enlarge", "fill_unknown", "reduce_map"]

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["bicubic", "nearest"]
"""How a coarse map is made of a fine one: by PIL's bicubic kernel, which blurs before it thins out, or by one pixel of each cell. Numbers
of the two cannot be compared."""


def reduce_map(fine: Tensor, factor: int, how: Reduction) -> Tensor:
    """A map (C, H, W) without unknown pixels at a `factor`-th of its size; H and W are multiples of it."""
    size = [side // factor for side in fine.shape[-2:]]
    if how == "nearest":
        return F.interpolate(fine[None], size, mode="nearest-exact")[0]
    return F.interpolate(fine[None], size, mode="bicubic", antialias=True)[0]


def enlarge(coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic (a = -0.5, as PIL): (C, h, w) to (C, *size)."""
    return F.interpolate(coarse[None], size, mode="bicubic", antialias=True)[0]


def fill_unknown(maps: Tensor) -> Tensor:
    """NaN of (C, H, W) replaced by means of known pixels around, taken from ever coarser grids until one has them.

    >>> fill_unknown(torch.tensor([[[1.0, float("nan")], [1.0, 1.0]]]))
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    known = maps.isfinite()
    if bool(known.all()) or max(maps.shape[-2:]) == 1:
        return maps
    pad = (0, maps.shape[-1] % 2, 0, maps.shape[-2] % 2)
    sums, counts = (F.avg_pool2d(F.pad(part, pad), 2) for part in (torch.where(known, maps, 0.0), known.to(maps.dtype)))
    coarser = fill_unknown(torch.where(counts > 0, sums / counts.clamp_min(0.25), torch.nan))
    spread = coarser.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., : maps.shape[-2], : maps.shape[-1]]
    return torch.where(known, maps, spread)
