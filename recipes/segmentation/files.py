"""Image files with mask files: naming, reading and checking them."""

from __future__ import annotations

__all__ = ["FileSource", "Pair", "check_files", "find_predict_images", "require_masks"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import image_size, name_images, read_image
from pl_normkit.recipes.loading import Part, checking
from pl_normkit.recipes.segmentation.images import MaskCode, mask_size, read_mask
from pl_normkit.recipes.segmentation.samples import Sample, SampleSource


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file; `name` is the image's path within its folder, without suffix."""

    name: str
    image: Path
    mask: Path | None


class FileSource(SampleSource):
    """Samples read from files."""

    def __init__(self, pairs: Sequence[Pair], code: MaskCode) -> None:
        self.pairs = pairs
        self.code = code

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def read_image(self, index: int) -> Tensor:
        return read_image(self.pairs[index].image)

    def read(self, index: int) -> Sample:
        pair = self.pairs[index]
        if pair.mask is None:
            raise DataError("an image has no mask", where=str(pair.image), fix="images without masks are for prediction only")
        return read_image(pair.image), read_mask(pair.mask, self.code)


def find_predict_images(folder: Path) -> list[Pair]:
    """Images of `folder`, without masks. Raises DataError when there are none."""
    return [Pair(name, path, None) for name, path in name_images(folder, "give a folder of images").items()]


def require_masks(pairs: Sequence[Pair]) -> None:
    """Raise DataError naming the first image whose mask is not there."""
    lacking = [pair for pair in pairs if pair.mask is None or not pair.mask.is_file()]
    if lacking:
        first = lacking[0]
        raise DataError(
            "an image has no mask",
            where=str(first.image),
            evidence=f"no file {first.mask}; {len(lacking)} of {len(pairs)} images lack theirs",
            fix="add the mask as a PNG with the name of its image, or take the image away",
        )


def check_files(pairs: Sequence[Pair], code: MaskCode, part: Part, *, decode_masks: bool) -> None:
    """Read every header, and every mask if `decode_masks`, with a progress bar.

    Raises DataError for the first file that cannot be read, a mask of another size than its image or with a class out of range,
    and for training masks that show fewer than two classes altogether.
    """
    seen: set[int] = set()
    with checking(pairs, part) as found:
        for pair in found:
            _check_pair_sizes(pair, code)
            if decode_masks and pair.mask is not None:
                seen.update(torch.unique(read_mask(pair.mask, code)).tolist())
    if decode_masks and part == "train" and len(seen - {code.ignore_index}) < 2:
        raise DataError(
            "the training masks show fewer than two classes",
            where=str(pairs[0].mask.parent if pairs[0].mask else pairs[0].image.parent),
            evidence=f"values in {len(pairs)} masks: {sorted(seen)}, of which {code.ignore_index} is ignored",
            fix="write class indices (0, 1, ...), not 0 and 255, into the masks; or set --data.ignore_index",
        )


def _check_pair_sizes(pair: Pair, code: MaskCode) -> None:
    image = image_size(pair.image)
    mask = mask_size(pair.mask, code) if pair.mask is not None else image
    if image != mask:
        raise DataError(
            "a mask has another size than its image",
            where=str(pair.mask),
            evidence=f"mask {mask[1]} x {mask[0]}, image {image[1]} x {image[0]} pixels",
            fix="save the mask at the size of its image (resize it with nearest-neighbour interpolation)",
        )
