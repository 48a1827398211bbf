"""Find, pair and split the files of a folder data set."""

from __future__ import annotations

__all__ = ["SplitBy", "pair_files", "read_class_names", "split_folder"]

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import require_folder
from pl_normkit.recipes.loading import Part
from pl_normkit.recipes.segmentation.files import Pair, name_images, read_split_file, require_masks

SplitBy = Literal["auto", "seed", "files", "folders"]

_LAYOUT = "put the images into images/ and the masks, under the same names, into masks/"


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
            fix="write a text file with one class name a line, in the order of the mask values, and give it as --data.classes",
        ) from error
    while lines and not lines[-1].strip():
        lines.pop()
    return _check_class_names([line.strip() for line in lines], str(path))


def _check_class_names(names: list[str], where: str) -> list[str]:
    fix = "write one class name a line, in the order of the mask values, and the background too"
    if len(names) < 2:
        raise DataError("a class list needs at least two classes", where=where, evidence=f"it has {len(names)}: {names}", fix=fix)
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError("a class has no name", where=f"{where}, line {number}", fix=fix)
        if name in names[: number - 1]:
            evidence = f"{name!r} stands on lines {names.index(name) + 1} and {number}"
            raise DataError("a class is named twice", where=where, evidence=evidence, fix="give each class its own name")
    return names


def pair_files(images: Path, masks: Path) -> list[Pair]:
    """Each image with the mask of the same name, sorted by name. Raises DataError naming the first image without a mask."""
    found = name_images(images, _LAYOUT)
    require_folder(masks, "the mask folder", _LAYOUT)
    pairs = [Pair(name, path, masks / f"{name}.png") for name, path in found.items()]
    require_masks(pairs)
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
            fix="add images, or lay the data out as train/ and val/",
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
    names = {part: read_split_file(root / f"{part}.txt", by_name) for part in parts}
    shared = sorted(set(names["train"]) & set(names["val"]))
    if shared:
        raise DataError(
            "an image is in both training and validation",
            where=f"{root / 'train.txt'} and val.txt",
            evidence=f"{shared[0]!r}; {len(shared)} in all",
            fix="list each image in one of them",
        )
    return {part: [by_name[name] for name in listed] for part, listed in names.items()}
