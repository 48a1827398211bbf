"""Find, pair, split and check the files of a folder data set."""

from __future__ import annotations

__all__ = ["FolderSource", "Pair", "SplitBy", "check_files", "find_predict_images", "pair_files", "read_class_names", "split_folder"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor

from pl_normkit.errors import DataError, nearest
from pl_normkit.recipes.image_files import find_images, image_size, read_image, require_folder
from pl_normkit.recipes.segmentation.images import mask_size, read_mask
from pl_normkit.recipes.segmentation.mosaic import Part
from pl_normkit.recipes.segmentation.samples import Sample, SampleSource

SplitBy = Literal["auto", "seed", "files", "folders"]

_LAYOUT = "put the images into images/ and the masks, under the same names, into masks/"


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file; `name` is the image's path within its folder, without suffix."""

    name: str
    image: Path
    mask: Path | None


class FolderSource(SampleSource):
    """Samples read from files."""

    def __init__(self, pairs: Sequence[Pair], class_names: Sequence[str], ignore_index: int) -> None:
        self.pairs = pairs
        self.class_names = class_names
        self.ignore_index = ignore_index

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def read_image(self, index: int) -> Tensor:
        return read_image(self.pairs[index].image)

    def read(self, index: int) -> Sample:
        pair = self.pairs[index]
        if pair.mask is None:
            raise DataError("an image has no mask", where=str(pair.image), mend="images without masks are for prediction only")
        return read_image(pair.image), read_mask(pair.mask, self.class_names, self.ignore_index)


def read_class_names(root: Path, classes: Sequence[str] | str | None) -> list[str]:
    """The class names themselves, or those in a text file, one a line; None reads `root/classes.txt`.

    Raises DataError for a missing or empty file, fewer than two classes, an empty name or one that occurs twice.
    """
    if classes is not None and not isinstance(classes, str):
        return _check_class_names(list(classes), "--data.classes")
    path = Path(classes) if classes is not None else root / "classes.txt"
    require_folder(root, "the data folder")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            "the class list cannot be read",
            where=str(path),
            evidence=f"{type(error).__name__}: {error}",
            mend="write a text file with one class name a line, in the order of the mask values, and give it as --data.classes",
        ) from error
    while lines and not lines[-1].strip():
        lines.pop()
    return _check_class_names([line.strip() for line in lines], str(path))


def _check_class_names(names: list[str], where: str) -> list[str]:
    mend = "write one class name a line, in the order of the mask values, and the background too"
    if len(names) < 2:
        raise DataError("a class list needs at least two classes", where=where, evidence=f"it has {len(names)}: {names}", mend=mend)
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError("a class has no name", where=f"{where}, line {number}", mend=mend)
        if name in names[: number - 1]:
            evidence = f"{name!r} stands on lines {names.index(name) + 1} and {number}"
            raise DataError("a class is named twice", where=where, evidence=evidence, mend="give each class its own name")
    return names


def _name_images(folder: Path) -> dict[str, Path]:
    require_folder(folder, "the image folder", _LAYOUT)
    found: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            evidence = f"{found[name].name} and {path.name}"
            raise DataError("two images have one name", where=str(folder), evidence=evidence, mend="rename or remove one of them")
        found[name] = path
    return found


def find_predict_images(folder: Path) -> list[Pair]:
    """Images of `folder`, without masks. Raises DataError when there are none."""
    return [Pair(name, path, None) for name, path in _name_images(folder).items()]


def pair_files(images: Path, masks: Path) -> list[Pair]:
    """Each image with the mask of the same name, sorted by name. Raises DataError naming the first image without a mask."""
    found = _name_images(images)
    require_folder(masks, "the mask folder", _LAYOUT)
    pairs = [Pair(name, path, masks / f"{name}.png") for name, path in found.items()]
    lacking = [pair for pair in pairs if pair.mask is None or not pair.mask.is_file()]
    if lacking:
        first = lacking[0]
        raise DataError(
            "an image has no mask",
            where=str(first.image),
            evidence=f"no file {first.mask}; {len(lacking)} of {len(pairs)} images lack theirs",
            mend="add the mask as a PNG with the name of its image, or take the image away",
        )
    return pairs


def split_folder(root: Path, split: SplitBy, val_share: float, seed: int) -> dict[Part, list[Pair]]:
    """Pairs for "train", "val" and, where the layout has one, "test". Raises DataError. See FolderData for the layouts."""
    require_folder(root, "the data folder")
    if split == "auto":
        split = "folders" if (root / "train").is_dir() else "files" if (root / "train.txt").is_file() else "seed"
    if split == "folders":
        return _split_by_folders(root)
    pairs = pair_files(root / "images", root / "masks")
    return _split_by_files(root, pairs) if split == "files" else _split_by_seed(root, pairs, val_share, seed)


def _split_by_folders(root: Path) -> dict[Part, list[Pair]]:
    parts: list[Part] = ["train", "val"]
    if (root / "test").is_dir():
        parts.append("test")
    return {part: pair_files(root / part / "images", root / part / "masks") for part in parts}


def _split_by_seed(root: Path, pairs: list[Pair], val_share: float, seed: int) -> dict[Part, list[Pair]]:
    if len(pairs) < 2:
        raise DataError(
            "one image cannot be split into training and validation",
            where=str(root / "images"),
            evidence=pairs[0].image.name,
            mend="add images, or lay the data out as train/ and val/",
        )
    held_out = min(max(round(len(pairs) * val_share), 1), len(pairs) - 1)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:held_out])
    return {
        "train": [pair for index, pair in enumerate(pairs) if index not in chosen],
        "val": [pairs[index] for index in sorted(chosen)],
    }


def _split_by_files(root: Path, pairs: list[Pair]) -> dict[Part, list[Pair]]:
    by_name = {pair.name: pair for pair in pairs}
    parts: list[Part] = ["train", "val"]
    if (root / "test.txt").is_file():
        parts.append("test")
    names = {part: _read_split_file(root / f"{part}.txt", by_name) for part in parts}
    shared = sorted(set(names["train"]) & set(names["val"]))
    if shared:
        raise DataError(
            "an image is in both training and validation",
            where=f"{root / 'train.txt'} and val.txt",
            evidence=f"{shared[0]!r}; {len(shared)} in all",
            mend="list each image in one of them",
        )
    return {part: [by_name[name] for name in listed] for part, listed in names.items()}


def _read_split_file(path: Path, by_name: dict[str, Pair]) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            "a split file cannot be read",
            where=str(path),
            evidence=f"{type(error).__name__}: {error}",
            mend="write one image name a line, without suffix, or split another way with --data.split",
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip() and line.strip() not in by_name:
            raise DataError(
                "a split file names an image that is not there",
                where=f"{path}, line {number}",
                evidence=repr(line.strip()),
                mend=nearest(line.strip(), by_name) or "write the name of a file in images/, without suffix",
            )
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError("a split file is empty", where=str(path), mend="write one image name a line, without suffix")
    return names


def check_files(pairs: Sequence[Pair], class_names: Sequence[str], ignore_index: int, part: Part, *, decode_masks: bool) -> None:
    """Read every header, and every mask if `decode_masks`, with a progress bar.

    Raises DataError for the first file that cannot be read, a mask of another size than its image or with a class out of range,
    and for training masks that show fewer than two classes altogether.
    """
    seen: set[int] = set()
    for pair in track(pairs, description=f"checking {part} files", transient=True):
        _check_pair_sizes(pair)
        if decode_masks and pair.mask is not None:
            seen.update(torch.unique(read_mask(pair.mask, class_names, ignore_index)).tolist())
    if decode_masks and part == "train" and len(seen - {ignore_index}) < 2:
        raise DataError(
            "the training masks show fewer than two classes",
            where=str(pairs[0].mask.parent if pairs[0].mask else pairs[0].image.parent),
            evidence=f"values in {len(pairs)} masks: {sorted(seen)}, of which {ignore_index} is ignored",
            mend="write class indices (0, 1, ...), not 0 and 255, into the masks; or set --data.ignore_index",
        )


def _check_pair_sizes(pair: Pair) -> None:
    image = image_size(pair.image)
    mask = mask_size(pair.mask) if pair.mask is not None else image
    if image != mask:
        raise DataError(
            "a mask has another size than its image",
            where=str(pair.mask),
            evidence=f"mask {mask[1]} x {mask[0]}, image {image[1]} x {image[0]} pixels",
            mend="save the mask at the size of its image (resize it with nearest-neighbour interpolation)",
        )
