"""Split the files of a folder data set into training, validation and test."""

from __future__ import annotations

__all__ = ["SplitBy", "read_split_file", "split_folder"]

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch

from pl_normkit.errors import DataError, nearest
from pl_normkit.recipes.image_files import require_folder
from pl_normkit.recipes.loading import Part

SplitBy = Literal["auto", "seed", "files", "folders"]


class NamedFiles(Protocol):
    """An image file and what belongs to it."""

    @property
    def name(self) -> str:
        """The image's path within its folder, without suffix."""

    @property
    def image(self) -> Path:
        """The image file."""


Found = TypeVar("Found", bound=NamedFiles)


def read_split_file(path: Path, known: Collection[str]) -> list[str]:
    """Image names, one a line, without suffix. Raises DataError for a file that cannot be read, is empty or names what is not `known`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            "a split file cannot be read",
            where=str(path),
            evidence=f"{type(error).__name__}: {error}",
            fix="write one image name a line, without suffix, or split another way with --data.split",
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip() and line.strip() not in known:
            raise DataError(
                "a split file names an image that is not there",
                where=f"{path}, line {number}",
                evidence=repr(line.strip()),
                fix=nearest(line.strip(), known) or "write the name of an image file, without suffix",
            )
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError("a split file is empty", where=str(path), fix="write one image name a line, without suffix")
    return names


def split_folder(root: Path, split: SplitBy, val_share: float, seed: int, find: Callable[[Path], list[Found]]) -> dict[Part, list[Found]]:
    """Samples for "train", "val" and, where the layout has one, "test". Raises DataError, and what `find` raises.

    Args:
        root: the folder.
        split: "folders" (`root/train`, `root/val`, maybe `root/test`), "files" (`root/train.txt` and so on name images of `root`), "seed"
            (a share `val_share` of `root`, drawn by `seed`, is for validation), or "auto": the first of these that is there.
        val_share: share of the images for validation.
        seed: of that draw.
        find: gives the samples of a folder, sorted by name.
    """
    require_folder(root, "the data folder")
    if split == "auto":
        split = "folders" if (root / "train").is_dir() else "files" if (root / "train.txt").is_file() else "seed"
    if split == "folders":
        parts: list[Part] = ["train", "val"]
        if (root / "test").is_dir():
            parts.append("test")
        return {part: find(root / part) for part in parts}
    found = find(root)
    return _split_by_files(root, found) if split == "files" else _split_by_seed(root, found, val_share, seed)


def _split_by_seed(root: Path, found: list[Found], val_share: float, seed: int) -> dict[Part, list[Found]]:
    if len(found) < 2:
        raise DataError(
            "one image cannot be split into training and validation",
            where=str(root / "images"),
            evidence=found[0].image.name,
            fix="add images, or lay the data out as train/ and val/",
        )
    held_out = min(max(round(len(found) * val_share), 1), len(found) - 1)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:held_out])
    return {
        "train": [sample for index, sample in enumerate(found) if index not in chosen],
        "val": [found[index] for index in sorted(chosen)],
    }


def _split_by_files(root: Path, found: list[Found]) -> dict[Part, list[Found]]:
    by_name = {sample.name: sample for sample in found}
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
