"""Logits of large images from overlapping windows."""

from __future__ import annotations

__all__ = ["predict_tiled", "window_starts"]

from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of `size` start on an axis of `length`: evenly spread, the last at its end, sharing at least `overlap`."""
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [round(index * (length - size) / (count - 1)) for index in range(count)]


def predict_tiled(network: Callable[[Tensor], Tensor], images: Tensor, size: int, overlap: int) -> Tensor:
    """Run `network` on windows of the images and blend its outputs where they overlap, the more the nearer to a window's centre.

    A map that is the same in all windows comes out bit for bit, and so does the output of one window alone. Memory: the logits of all
    windows are never held at once.

    Args:
        network: images (N, C, h, w) to logits (N, classes, h, w), of any h and w up to `size`.
        images: (N, C, H, W).
        size: side of the square windows in pixels; an axis shorter than that is taken whole.
        overlap: pixels that neighbours share at least, below `size`.

    Returns:
        Logits (N, classes, H, W), of the network's dtype.
    """
    height, width = images.shape[-2:]
    rows, columns = (window_starts(side, size, overlap) for side in (height, width))
    if len(rows) == len(columns) == 1:
        return network(images)
    blended: Tensor | None = None
    total = images.new_zeros(height, width, dtype=torch.float32)
    for top in rows:
        for left in columns:
            window = (..., slice(top, min(top + size, height)), slice(left, min(left + size, width)))
            logits = network(images[window])
            if blended is None:
                blended = logits.new_zeros(*logits.shape[:2], height, width)
            weights = _weigh(logits)
            total[window] += weights
            # A running mean: what all windows agree on passes without rounding.
            known = blended[window]
            blended[window] = known + (logits - known) * (weights / total[window]).to(logits.dtype)
    assert blended is not None
    return blended


def _weigh(logits: Tensor) -> Tensor:
    """Weights (h, w) that fall linearly from the centre of the window to its borders, all above 0."""
    sides = []
    for length in logits.shape[-2:]:
        steps = torch.arange(1, length + 1, device=logits.device, dtype=torch.float32)
        sides.append(torch.minimum(steps, length + 1 - steps))
    return sides[0][:, None] * sides[1]
