"""Images with map files: a folder of pairs, Middlebury's scenes, and the arrays of NYU v2."""

from __future__ import annotations

__all__ = ["ArraySource", "CoarsePairs", "MapPair", "PairSource", "find_pairs", "find_scenes"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import image_size, name_images, read_image, require_folder
from pl_normkit.recipes.loading import Part, checking
from pl_normkit.recipes.upsampling.maps import MAP_SUFFIXES, load_array, map_file, one_hot, read_map
from pl_normkit.recipes.upsampling.samples import MapSource, Sample

_LAYOUT = "put the images into images/ and their maps, under the same names, into maps/"
_SCENE_FILES = (("im0.png", "disp0.pfm"), ("im0.png", "disp0.png"), ("view1.png", "disp1.png"), ("im2.ppm", "disp2.pgm"))
"""Image and disparity of a Middlebury scene: 2014 and 2021, 2005 and 2006, 2001 and 2003."""


@dataclass(frozen=True)
class MapPair:
    """An image file and its map file; `name` is the image's path within its folder, without suffix."""

    name: str
    image: Path
    map: Path


def find_pairs(folder: Path) -> list[MapPair]:
    """Each image of `folder/images` with the map of its name in `folder/maps`, sorted. Raises DataError naming one without a map."""
    images = name_images(folder / "images", _LAYOUT)
    require_folder(folder / "maps", "the map folder", _LAYOUT)
    maps = {name: map_file(folder / "maps", name) for name in images}
    lacking = [name for name, path in maps.items() if path is None]
    if lacking:
        raise DataError(
            "an image has no map",
            where=str(images[lacking[0]]),
            evidence=f"no maps/{lacking[0]} ({', '.join(MAP_SUFFIXES)}); {len(lacking)} of {len(images)} images lack theirs",
            fix="add the map under the name of its image, or take the image away",
        )
    return [MapPair(name, images[name], path) for name, path in maps.items() if path is not None]


def find_scenes(root: Path) -> list[MapPair]:
    """The Middlebury scenes under `root`, sorted. Raises DataError when there are none."""
    require_folder(root, "the data folder")
    found = []
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        files = next(((a, b) for a, b in _SCENE_FILES if (folder / a).is_file() and (folder / b).is_file()), None)
        if files is not None:
            found.append(MapPair(folder.relative_to(root).as_posix(), folder / files[0], folder / files[1]))
    if not found:
        wanted = ", ".join(f"{image} and {disparity}" for image, disparity in _SCENE_FILES)
        raise DataError("there is no Middlebury scene", where=str(root), fix=f"unpack scenes there, each a folder with {wanted}")
    return found


class PairSource(MapSource):
    """Pairs of files, checked when the source is built: a progress bar, and DataError for the first that cannot be used.

    Args:
        pairs: of files.
        part: named in the progress bar.
        unknown: value of pixels without a measurement.
        classes: number of classes of label maps; 0 for numbers.
    """

    def __init__(self, pairs: Sequence[MapPair], part: Part, unknown: float | None, classes: int) -> None:
        self.pairs, self.unknown, self.classes = pairs, unknown, classes
        with checking(pairs, part) as found:
            for pair in found:
                self.check(pair, image_size(pair.image), self._read_map(pair))

    def check(self, pair: MapPair, size: tuple[int, int], values: Tensor) -> None:
        """Raise DataError unless image and map fit."""
        if size != values.shape[-2:]:
            raise DataError(
                "a map has another size than its image",
                where=str(pair.map),
                evidence=f"map {values.shape[-1]} x {values.shape[-2]}, image {size[1]} x {size[0]} pixels",
                fix="give fine maps at the size of their images: coarse ones are made of them (to enlarge coarse maps, use predict)",
            )

    def _read_map(self, pair: MapPair) -> Tensor:
        values = read_map(pair.map, self.unknown)
        return one_hot(values, self.classes, pair.map) if self.classes else values[None]

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def read(self, index: int) -> Sample:
        return Sample(read_image(self.pairs[index].image), self._read_map(self.pairs[index]))


class CoarsePairs(PairSource):
    """Images with coarse maps, for prediction: each side of an image is `factor` times that of its map."""

    def __init__(self, pairs: Sequence[MapPair], factor: int, unknown: float | None, classes: int) -> None:
        self.factor = factor
        super().__init__(pairs, "test", unknown, classes)

    def check(self, pair: MapPair, size: tuple[int, int], values: Tensor) -> None:
        if size != tuple(side * self.factor for side in values.shape[-2:]):
            raise DataError(
                f"an image is not {self.factor} times as large as its coarse map",
                where=str(pair.image),
                evidence=f"image {size[1]} x {size[0]}, map {values.shape[-1]} x {values.shape[-2]} pixels",
                fix="crop or resize one of them, or set --data.factor and take a network that was trained for it",
            )


class ArraySource(MapSource):
    """Images (N, H, W, 3) and depths (N, H, W) or (N, H, W, 1) in two .npy files, left on disk. Raises DataError."""

    def __init__(self, images: Path, depths: Path) -> None:
        self.paths = images, depths
        arrays = []
        for path, what in ((images, "images"), (depths, "depths")):
            if not path.is_file():
                raise DataError(f"the {what} are not there", where=str(path), fix="give the folder of NYU v2's arrays as --data.root")
            arrays.append(load_array(path))
        self.images, self.depths = arrays
        fits = self.images.ndim == 4 and self.images.shape[-1] == 3 and self.depths.ndim in (3, 4)
        if not fits or self.images.shape[:3] != self.depths.shape[:3] or self.depths.shape[3:] not in ((), (1,)):
            raise DataError(
                "images and depths do not fit together",
                where=f"{images} and {depths.name}",
                evidence=f"{self.images.shape} and {self.depths.shape}",
                fix="store images as (N, H, W, 3) and depths as (N, H, W)",
            )

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.paths[1].stem}_{index:04d}"

    def read(self, index: int) -> Sample:
        image = torch.from_numpy(np.array(self.images[index]).astype(np.float32))
        if self.images.dtype.kind == "f" and float(image.max()) <= 1:
            image = image * 255
        depth = torch.from_numpy(np.array(self.depths[index]).astype(np.float32)).reshape(1, *image.shape[:2])
        depth = depth.masked_fill(~depth.isfinite() | (depth <= 0), torch.nan)
        if not bool(depth.isfinite().any()):
            raise DataError("a map has no known pixel", where=f"{self.paths[1]}, number {index}", fix="take it out of the arrays")
        return Sample(image.permute(2, 0, 1).round().clamp(0, 255).to(torch.uint8), depth)
