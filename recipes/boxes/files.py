"""Images with box files, and masks where there are any: a folder of one's own, and PASCAL VOC's."""

from __future__ import annotations

__all__ = ["BoxedFile", "FileBoxSource", "PlainSource", "find_boxed", "find_voc"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.boxes.annotations import BOX_SUFFIXES, Boxes, box_file, read_boxes
from pl_normkit.recipes.boxes.samples import VOID, BoxSource
from pl_normkit.recipes.image_files import image_size, name_images, read_image, require_folder
from pl_normkit.recipes.loading import Part, checking
from pl_normkit.recipes.segmentation.files import FileSource, Pair
from pl_normkit.recipes.segmentation.images import MaskCode, mask_size, read_mask
from pl_normkit.recipes.segmentation.samples import Sample
from pl_normkit.recipes.splitting import read_split_file

_LAYOUT = "put the images into images/ and their boxes, under the same names, into boxes/"


@dataclass(frozen=True)
class BoxedFile:
    """An image file, its boxes and its mask, where it has them; `name` is the image's path within its folder, without suffix."""

    name: str
    image: Path
    boxes: Path | None
    mask: Path | None


def find_boxed(folder: Path) -> list[BoxedFile]:
    """Each image of `folder/images` with what has its name in `folder/boxes` and `folder/masks`, sorted. Raises DataError."""
    images = name_images(folder / "images", _LAYOUT)
    require_folder(folder / "boxes", "the folder of boxes", _LAYOUT)
    return [BoxedFile(name, path, box_file(folder / "boxes", name), _mask(folder / "masks", name)) for name, path in images.items()]


def find_voc(base: Path, lists: dict[Part, str]) -> dict[Part, list[BoxedFile]]:
    """Images of VOC's lists, with `Annotations` and `SegmentationClass`. Raises DataError."""
    require_folder(base / "Annotations", "the folder of boxes", "unpack the whole archive")
    images = name_images(base / "JPEGImages", "unpack the archive there")
    found: dict[Part, list[BoxedFile]] = {}
    for part, name in lists.items():
        names = read_split_file(base / "ImageSets" / "Segmentation" / f"{name}.txt", images)
        masks = base / "SegmentationClass"
        found[part] = [BoxedFile(name, images[name], box_file(base / "Annotations", name), _mask(masks, name)) for name in names]
    return found


def _mask(folder: Path, name: str) -> Path | None:
    return path if (path := folder / f"{name}.png").is_file() else None


class FileBoxSource(BoxSource):
    """Samples in files, checked when the source is built. Training images need boxes; masks are for scoring, and any may lack one.

    Raises DataError for the first file that cannot be used, and where no training image has a box.
    """

    def __init__(self, files: Sequence[BoxedFile], class_names: Sequence[str], part: Part) -> None:
        self.files, self.class_names = files, class_names
        self.code = MaskCode(class_names, VOID)
        lacking = [file for file in files if file.boxes is None]
        if part == "train" and lacking:
            raise DataError(
                "a training image has no boxes",
                where=str(lacking[0].image),
                evidence=f"no file of its name with {', '.join(BOX_SUFFIXES)}; {len(lacking)} of {len(files)} images lack theirs",
                fix='add the boxes ({"boxes": [], "labels": []} where there is no object), or take the image away',
            )
        with checking(files, part) as found:
            count = sum(self._check(file) for file in found)
        if part == "train" and not count:
            raise DataError("no training image has a box", where=str(files[0].image.parent), fix="draw boxes around the objects")

    def _check(self, file: BoxedFile) -> int:
        """The number of boxes."""
        size = image_size(file.image)
        if file.mask is not None and (found := mask_size(file.mask, self.code)) != size:
            evidence = f"mask {found[1]} x {found[0]}, image {size[1]} x {size[0]} pixels"
            raise DataError(
                "a mask has another size than its image", where=str(file.mask), evidence=evidence, fix="resize it, or take it out"
            )
        if file.mask is not None:
            read_mask(file.mask, self.code)
        return len(read_boxes(file.boxes, self.class_names, size).labels) if file.boxes is not None else 0

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index].name

    def read_image(self, index: int) -> Tensor:
        return read_image(self.files[index].image)

    def read(self, index: int) -> Sample:
        image, mask = self.read_image(index), self.files[index].mask
        return image, torch.full(image.shape[1:], VOID) if mask is None else read_mask(mask, self.code)

    def read_boxes(self, index: int) -> Boxes:
        file = self.files[index]
        assert file.boxes is not None  # checked above
        return read_boxes(file.boxes, self.class_names, image_size(file.image))


class PlainSource(FileSource):
    """Images alone."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__(pairs, MaskCode((), VOID))
