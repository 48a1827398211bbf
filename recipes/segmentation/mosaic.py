"""TextureMosaic: a built-in segmentation data set made of real photographs, with nothing to download."""

from __future__ import annotations

__all__ = ["TEXTURES", "MosaicSource", "Texture", "compose_mosaic", "cut_part", "load_photograph"]

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import read_gray
from pl_normkit.recipes.loading import Part
from pl_normkit.recipes.segmentation.samples import Sample, SampleSource


@dataclass(frozen=True)
class Texture:
    """A class of the data set and the photograph, bundled with scikit-image, that shows it."""

    name: str
    file: str


TEXTURES = (
    Texture("brick", "brick.png"),
    Texture("coins", "coins.png"),
    Texture("galaxies", "hubble_deep_field.jpg"),
    Texture("grass", "grass.png"),
    Texture("gravel", "gravel.png"),
    Texture("moon", "moon.png"),
    Texture("print", "page.png"),
    Texture("tissue", "ihc.png"),
)
"""All eight lie in scikit-image's wheel. They are read as grey values: colour would give the class away."""


def load_photograph(texture: Texture) -> Tensor:
    """Grey values (H, W), uint8. Raises DataError without scikit-image or when its file is missing."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError(
            "TextureMosaic is made of the photographs in scikit-image, which is not installed",
            fix="pip install 'pl_normkit[demo]', or train on your own images with --data FolderData",
        )
    return read_gray(Path(spec.origin).parent / "data" / texture.file)


def cut_part(photograph: Tensor, part: Part, train_share: float = 0.6) -> Tensor:
    """Training takes the left `train_share` of the photograph (H, W), validation and test the rest: no pixel is in both."""
    border = round(photograph.shape[1] * train_share)
    return photograph[:, :border] if part == "train" else photograph[:, border:]


def _mirror(start: int, length: int, period: int) -> Tensor:
    steps = torch.arange(start, start + length) % (2 * period)
    return torch.minimum(steps, 2 * period - 1 - steps)


def _random_patch(part: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random (size, size) patch of `part`, mirrored at its borders where `part` is smaller than `size`."""
    height, width = part.shape
    top = int(torch.randint(max(height - size, 0) + 1, (), generator=generator))
    left = int(torch.randint(max(width - size, 0) + 1, (), generator=generator))
    return part[_mirror(top, size, height)][:, _mirror(left, size, width)]


def compose_mosaic(parts: Sequence[Tensor], size: int, regions: int, generator: torch.Generator) -> Sample:
    """Fill the Voronoi cells of `regions` random points with random textures.

    Args:
        parts: one grey image (H, W) per class, any dtype.
        size: side of the mosaic in pixels.
        regions: number of Voronoi cells.
        generator: source of all randomness.

    Returns:
        Mosaic (size, size) of the parts' dtype, every value a copy of a value in `parts`, and labels (size, size) int64.
    """
    points = torch.rand(regions, 2, generator=generator) * size
    axis = torch.arange(size) + 0.5
    squares = (axis[:, None, None] - points[:, 0]) ** 2 + (axis[None, :, None] - points[:, 1]) ** 2
    owner = squares.argmin(dim=-1)
    classes = torch.randint(len(parts), (regions,), generator=generator)
    mosaic = torch.empty(size, size, dtype=parts[0].dtype)
    for region, label in enumerate(classes.tolist()):
        inside = owner == region
        mosaic[inside] = _random_patch(parts[label], size, generator)[inside]
    return mosaic, classes[owner]


class MosaicSource(SampleSource):
    """`count` mosaics of one part of the photographs; sample `i` depends on `seed`, `part` and `i` alone."""

    def __init__(self, photographs: Sequence[Tensor], part: Part, *, count: int, size: int, regions: int, seed: int) -> None:
        self.parts = [cut_part(photograph, part) for photograph in photographs]
        self.part = part
        self.count = count
        self.size = size
        self.regions = regions
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        digits = len(str(self.count - 1))
        return f"{self.part}_{index:0{digits}d}"

    def compose(self, index: int) -> Sample:
        """Mosaic `index` with its labels, in the photographs' dtype."""
        stream = ("train", "val", "test").index(self.part)
        generator = torch.Generator().manual_seed((self.seed * 3 + stream) * 1_000_003 + index)
        return compose_mosaic(self.parts, self.size, self.regions, generator)

    def read(self, index: int) -> Sample:
        gray, mask = self.compose(index)
        return gray.expand(3, -1, -1), mask

    def read_image(self, index: int) -> Tensor:
        return self.read(index)[0]
