"""TextureMosaic: a built-in segmentation data set made of real photographs, with nothing to download."""

from __future__ import annotations

__all__ = ["TEXTURES", "MosaicSource", "Texture", "compose_mosaic", "load_photograph"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pl_normkit.recipes.image_files import read_gray
from pl_normkit.recipes.loading import Part
from pl_normkit.recipes.photographs import cut_part, draw_cells, draw_patch, find_photograph
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
    return read_gray(find_photograph(texture.file, "TextureMosaic"))


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
    owner = draw_cells(size, regions, generator)
    classes = torch.randint(len(parts), (regions,), generator=generator)
    mosaic = torch.empty(size, size, dtype=parts[0].dtype)
    for region, label in enumerate(classes.tolist()):
        inside = owner == region
        mosaic[inside] = draw_patch(parts[label], size, generator)[inside]
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
