"""Photographs inside scikit-image's wheel, and what built-in data sets cut out of them. Nothing is downloaded."""

from __future__ import annotations

__all__ = ["cut_part", "draw_cells", "draw_patch", "find_photograph"]

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.loading import Part


def find_photograph(file: str, data_set: str) -> Path:
    """The file of that name in scikit-image's wheel. Raises DataError without scikit-image, naming the data set that needs it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError(
            f"{data_set} is made of the photographs in scikit-image, which is not installed",
            fix="pip install 'pl_normkit[demo]', or train on your own images with --data FolderData",
        )
    return Path(spec.origin).parent / "data" / file


def cut_part(photograph: Tensor, part: Part, train_share: float = 0.6) -> Tensor:
    """Training takes the left `train_share` of the photograph (..., H, W), validation and test the rest: no pixel is in both."""
    border = round(photograph.shape[-1] * train_share)
    return photograph[..., :border] if part == "train" else photograph[..., border:]


def _mirror(start: int, length: int, period: int) -> Tensor:
    steps = torch.arange(start, start + length) % (2 * period)
    return torch.minimum(steps, 2 * period - 1 - steps)


def draw_patch(part: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random (..., size, size) patch of `part`, mirrored at its borders where `part` is smaller than `size`."""
    height, width = part.shape[-2:]
    top = int(torch.randint(max(height - size, 0) + 1, (), generator=generator))
    left = int(torch.randint(max(width - size, 0) + 1, (), generator=generator))
    return part[..., _mirror(top, size, height), :][..., _mirror(left, size, width)]


def draw_cells(size: int, regions: int, generator: torch.Generator) -> Tensor:
    """The Voronoi cells of `regions` random points: the number of its cell for each pixel (size, size)."""
    points = torch.rand(regions, 2, generator=generator) * size
    axis = torch.arange(size) + 0.5
    squares = (axis[:, None, None] - points[:, 0]) ** 2 + (axis[None, :, None] - points[:, 1]) ** 2
    return squares.argmin(dim=-1)
