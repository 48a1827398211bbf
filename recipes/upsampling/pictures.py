"""A sheet of images with true, enlarged and sharpened maps, and where both are wrong."""

from __future__ import annotations

__all__ = ["draw_maps"]

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pl_normkit.recipes.sheets import draw_sheet, paint_values


def draw_maps(samples: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], method: str, path: Path) -> None:
    """Write a PNG.

    Args:
        samples: guidance (3, H, W) in [0, 1], truth (H, W) with NaN where unknown, bicubic and network's maps (H, W), in one unit.
        method: name of the network.
        path: file to write; its folder is made.
    """
    rows = []
    for guidance, truth, bicubic, found in samples:
        known = truth[truth.isfinite()]
        low, high = float(known.min()), float(known.max())
        maps = [paint_values(values, low, high) for values in (truth, bicubic, found)]
        errors = [paint_values((values - truth).abs(), 0, 0.2 * (high - low)) for values in (bicubic, found)]
        rows.append([(guidance * 255).round().byte(), *maps, *errors])
    draw_sheet(("image", "truth", "bicubic", method, "error of bicubic", f"error of {method}"), rows, path)
