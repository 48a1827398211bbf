"""StereoAndPlanes: a photograph with its measured disparity, and rooms of slanted planes under photographs."""

from __future__ import annotations

__all__ = ["PlanesSource", "StereoSource", "TwoSources", "compose_planes"]

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pl_normkit.recipes.image_files import read_image
from pl_normkit.recipes.loading import Part
from pl_normkit.recipes.photographs import cut_part, draw_cells, draw_patch, find_photograph
from pl_normkit.recipes.upsampling.samples import MapSource, Sample

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "rocket.jpg")
"""Colour photographs in scikit-image's wheel."""

_RANGE = (8.0, 64.0)
"""Disparities of the planes, pixels: about those of the stereo pair."""


class StereoSource(MapSource):
    """The left image of scikit-image's motorcycle (Middlebury 2014, a quarter of its size) with its disparity in pixels.

    Training takes the left 60 % of the picture, validation and test the rest. `count` repeats it, for crops.
    """

    def __init__(self, part: Part, count: int = 1) -> None:
        image = read_image(find_photograph("motorcycle_left.png", "StereoAndPlanes"))
        with np.load(find_photograph("motorcycle_disp.npz", "StereoAndPlanes")) as stored:
            disparity = torch.from_numpy(stored["arr_0"].astype(np.float32))
        unknown = ~disparity.isfinite() | (disparity <= 0)
        self.sample = Sample(cut_part(image, part), cut_part(disparity.masked_fill(unknown, torch.nan)[None], part))
        self.part, self.count = part, count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"stereo_{self.part}_{index}"

    def group(self, index: int) -> str:
        return "stereo"

    def read(self, index: int) -> Sample:
        return self.sample


def compose_planes(photographs: Sequence[Tensor], size: int, regions: int, generator: torch.Generator) -> Sample:
    """Voronoi cells, each a slanted plane of disparities under a patch of a photograph of its own brightness.

    Photographs have edges inside a plane too, so the image alone does not give the map away.

    Args:
        photographs: (3, H, W) uint8 each.
        size: side in pixels.
        regions: number of cells.
        generator: source of all randomness.
    """
    owner = draw_cells(size, regions, generator)
    axis = torch.linspace(-1, 1, size)
    low, high = _RANGE
    image, depth = torch.empty(3, size, size, dtype=torch.uint8), torch.empty(size, size)
    for region in range(regions):
        inside = owner == region
        middle, *slopes = torch.rand(3, generator=generator).tolist()
        plane = low + (high - low) * middle + 12 * (slopes[0] - 0.5) * axis + 12 * (slopes[1] - 0.5) * axis[:, None]
        depth[inside] = plane.clamp(low, high)[inside]
        photograph = photographs[int(torch.randint(len(photographs), (), generator=generator))]
        light = 0.5 + 0.8 * float(torch.rand((), generator=generator))
        patch = (draw_patch(photograph, size, generator).float() * light).clamp(0, 255).to(torch.uint8)
        image[:, inside] = patch[:, inside]
    return Sample(image, depth[None])


class PlanesSource(MapSource):
    """`count` rooms of planes; sample `i` depends on `seed`, `part` and `i` alone."""

    def __init__(self, part: Part, *, count: int, size: int, regions: int, seed: int) -> None:
        self.photographs = [cut_part(read_image(find_photograph(file, "StereoAndPlanes")), part) for file in PHOTOGRAPHS]
        self.part, self.count, self.size, self.regions, self.seed = part, count, size, regions, seed

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"planes_{self.part}_{index}"

    def group(self, index: int) -> str:
        return "planes"

    def read(self, index: int) -> Sample:
        stream = ("train", "val", "test").index(self.part)
        generator = torch.Generator().manual_seed((self.seed * 3 + stream) * 1_000_003 + index)
        return compose_planes(self.photographs, self.size, self.regions, generator)


class TwoSources(MapSource):
    """One source after the other."""

    def __init__(self, first: MapSource, second: MapSource) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def _find(self, index: int) -> tuple[MapSource, int]:
        return (self.first, index) if index < len(self.first) else (self.second, index - len(self.first))

    def name(self, index: int) -> str:
        source, place = self._find(index)
        return source.name(place)

    def group(self, index: int) -> str:
        source, place = self._find(index)
        return source.group(place)

    def read(self, index: int) -> Sample:
        source, place = self._find(index)
        return source.read(place)
