"""TextureObjects: a textured object or two on a textured ground, made of scikit-image's photographs."""

from __future__ import annotations

__all__ = ["GROUNDS", "OBJECTS", "ObjectSource", "compose_scene"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pl_normkit.recipes.boxes.annotations import Boxes
from pl_normkit.recipes.boxes.samples import BoxSource
from pl_normkit.recipes.image_files import read_gray
from pl_normkit.recipes.loading import Part
from pl_normkit.recipes.photographs import cut_part, draw_patch, find_photograph
from pl_normkit.recipes.segmentation.mosaic import TEXTURES
from pl_normkit.recipes.segmentation.samples import Sample

OBJECTS = ("brick", "coins", "print")
"""Textures of the classes."""
GROUNDS = ("grass", "gravel", "moon")
"""Textures that are background; a scene has one of them."""


def load_textures(names: Sequence[str], part: Part) -> list[Tensor]:
    """The parts of the photographs (H, W) uint8. Raises DataError without scikit-image."""
    files = {texture.name: texture.file for texture in TEXTURES}
    return [cut_part(read_gray(find_photograph(files[name], "TextureObjects")), part) for name in names]


def _blob(size: int, generator: torch.Generator) -> Tensor:
    """A round shape with bulges, (size, size) bool, of a random place and size."""
    radius = size * (0.14 + 0.14 * float(torch.rand((), generator=generator)))
    middle = radius + (size - 2 * radius) * torch.rand(2, generator=generator)
    axis = torch.arange(size) + 0.5
    y, x = axis[:, None] - middle[0], axis[None] - middle[1]
    angle = torch.atan2(y.expand(size, size), x.expand(size, size))
    border = torch.full((size, size), 0.8)
    for waves in (2, 3, 5):
        phase = 2 * math.pi * float(torch.rand((), generator=generator))
        border = border + 0.35 / waves * torch.sin(waves * angle + phase)
    return (y**2 + x**2).sqrt() < radius * border


def compose_scene(
    objects: Sequence[Tensor], grounds: Sequence[Tensor], size: int, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[tuple[int, list[float]]]]:
    """Grey values (size, size), labels (size, size) int64 with 0 for the ground, and a class with a box for each object to be seen.

    Args:
        objects: textures of the classes 1, 2, ...
        grounds: textures of the background.
        size: side in pixels.
        most: objects at most; later ones may cover earlier ones.
        generator: source of all randomness.
    """
    ground = int(torch.randint(len(grounds), (), generator=generator))
    image, labels = draw_patch(grounds[ground], size, generator).clone(), torch.zeros(size, size, dtype=torch.int64)
    owner = torch.zeros(size, size, dtype=torch.int64)
    classes = []
    for number in range(1, int(torch.randint(1, most + 1, (), generator=generator)) + 1):
        label = int(torch.randint(1, len(objects) + 1, (), generator=generator))
        inside = _blob(size, generator)
        image[inside] = draw_patch(objects[label - 1], size, generator)[inside]
        labels[inside], owner[inside] = label, number
        classes.append(label)
    found = []
    for number, label in enumerate(classes, 1):
        rows, columns = (owner == number).nonzero(as_tuple=True)
        if len(rows) > 16:  # not covered by the others
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found.append((label, [float(corner) for corner in corners]))
    return image, labels, found


class ObjectSource(BoxSource):
    """`count` scenes; scene `i` depends on `seed`, `part` and `i` alone."""

    def __init__(self, part: Part, *, count: int, size: int, most: int, seed: int) -> None:
        self.objects, self.grounds = load_textures(OBJECTS, part), load_textures(GROUNDS, part)
        self.part, self.count, self.size, self.most, self.seed = part, count, size, most, seed

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.part}_{index:05d}"

    def _compose(self, index: int) -> tuple[Tensor, Tensor, list[tuple[int, list[float]]]]:
        stream = ("train", "val", "test").index(self.part)
        generator = torch.Generator().manual_seed((self.seed * 3 + stream) * 1_000_003 + index)
        return compose_scene(self.objects, self.grounds, self.size, self.most, generator)

    def read(self, index: int) -> Sample:
        gray, labels, _ = self._compose(index)
        return gray.expand(3, -1, -1), labels

    def read_image(self, index: int) -> Tensor:
        return self.read(index)[0]

    def read_boxes(self, index: int) -> Boxes:
        found = self._compose(index)[2]
        return Boxes(torch.tensor([box for _, box in found]).view(-1, 4), torch.tensor([label for label, _ in found], dtype=torch.int64))
