"""A folder of images, one subfolder a class."""

from __future__ import annotations

__all__ = ["FolderData"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pl_normkit.errors import DataError, nearest
from pl_normkit.recipes.image_files import find_images, image_size, read_image, require_folder
from pl_normkit.recipes.loading import Part, checking, require_option
from pl_normkit.recipes.vit.data import ClassificationData
from pl_normkit.recipes.vit.samples import ImageSource

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LAYOUT = "put the images of each class into a folder of its own: train/cat/1.jpg, train/dog/1.jpg, val/cat/2.jpg, ..."


@dataclass(frozen=True)
class Labelled:
    """An image file and the index of its class, -1 for none."""

    path: Path
    label: int


class FileSource(ImageSource):
    """Images read from files as RGB; their names are paths under `root`."""

    def __init__(self, files: Sequence[Labelled], root: Path) -> None:
        self.files = files
        self.root = root

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        return read_image(file.path), file.label

    def name(self, index: int) -> str:
        return self.files[index].path.relative_to(self.root).as_posix()


class FolderData(ClassificationData):
    """Images in folders, one a class (torchvision's ImageFolder layout).

    With a folder `root/train` there must be `root/val` (and maybe `root/test`), each with a folder for each class. Else the
    folders of the classes lie in `root` itself, and of each class `val_share` of the images, drawn by `seed`, are for
    validation. The classes are sorted by name. Without images of their own, tests run on the validation images.

    Args:
        root: the folder.
        val_share: see above; without meaning where there is a folder `val`.
        seed: of that draw.
        predict_dir: folder of images for `predict`, at any depth; None predicts the test (or validation) images.
        mean, std: ImageNet's by default.
        options: see ClassificationData.

    Raises DataError for everything that is wrong with the folder; every header is read before the first step.
    """

    def __init__(
        self,
        root: str,
        val_share: float = 0.2,
        seed: int = 0,
        predict_dir: str | None = None,
        mean: list[float] | None = list(IMAGENET_MEAN),  # noqa: B006 - only read
        std: list[float] | None = list(IMAGENET_STD),  # noqa: B006
        **options: Any,
    ) -> None:
        require_option(0 < val_share < 1, "val_share", val_share, "take a share between 0 and 1")
        self.root = Path(root)
        self.val_share = val_share
        self.seed = seed
        self.predict_dir = Path(predict_dir) if predict_dir is not None else None
        self._class_names: list[str] | None = None
        super().__init__(mean=mean, std=std, **options)

    @property
    def class_names(self) -> list[str]:
        if self._class_names is None:
            self._class_names = _find_classes(self.root / "train" if self._has_parts() else self.root)
        return self._class_names

    @property
    def in_chans(self) -> int:
        return 3

    def _has_parts(self) -> bool:
        require_folder(self.root, "the data folder")
        return (self.root / "train").is_dir()

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, ImageSource]:
        files = self._find_parts(parts) if self._has_parts() else self._draw_parts(parts)
        for part, found in files.items():
            with checking(found, part) as unchecked:
                for file in unchecked:
                    image_size(file.path)
        return {part: FileSource(found, self.root) for part, found in files.items()}

    def _find_parts(self, parts: tuple[Part, ...]) -> dict[Part, list[Labelled]]:
        folders = {part: self.root / (part if part != "test" or (self.root / "test").is_dir() else "val") for part in parts}
        for folder in folders.values():
            require_folder(folder, f"the {folder.name} folder", f"{_LAYOUT}; or leave train/ out and let --data.val_share draw")
        return {part: _list_files(folder, self.class_names) for part, folder in folders.items()}

    def _draw_parts(self, parts: tuple[Part, ...]) -> dict[Part, list[Labelled]]:
        generator = torch.Generator().manual_seed(self.seed)
        drawn: dict[Part, list[Labelled]] = {"train": [], "val": []}
        for label, name in enumerate(self.class_names):
            paths = find_images(self.root / name)
            held_out = min(max(round(len(paths) * self.val_share), 1), len(paths) - 1)
            if held_out < 1:
                raise DataError(
                    "a class of one image cannot be split into training and validation",
                    where=str(paths[0]),
                    fix="add images of this class, or lay the data out as train/ and val/",
                )
            order = torch.randperm(len(paths), generator=generator).tolist()
            drawn["val"] += [Labelled(paths[index], label) for index in sorted(order[:held_out])]
            drawn["train"] += [Labelled(paths[index], label) for index in sorted(order[held_out:])]
        return {part: drawn["val" if part == "test" else part] for part in parts}

    def build_predict_source(self) -> ImageSource:
        if self.predict_dir is None:
            return super().build_predict_source()
        require_folder(self.predict_dir, "the folder to predict", "give the right one with --data.predict_dir PATH")
        return FileSource([Labelled(path, -1) for path in find_images(self.predict_dir)], self.predict_dir)


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _find_classes(folder: Path) -> list[str]:
    names = _subfolders(folder)
    if len(names) < 2:
        raise DataError(
            "a classifier needs at least two classes",
            where=str(folder),
            evidence=f"folders found there: {names or 'none'}",
            fix=_LAYOUT,
        )
    return names


def _list_files(folder: Path, class_names: list[str]) -> list[Labelled]:
    """All images of the class folders in `folder`. A class may lack here, but no other folder may be here."""
    found = _subfolders(folder)
    strange = [name for name in found if name not in class_names]
    if strange:
        raise DataError(
            f"{folder.name} has a class that train does not have",
            where=str(folder / strange[0]),
            evidence=f"{len(strange)} such folders: {strange[:8]}",
            fix=nearest(strange[0], class_names) or "move the folder away, or add its class to train",
        )
    if not found:
        raise DataError("a data folder has no class folders", where=str(folder), fix=_LAYOUT)
    return [Labelled(path, class_names.index(name)) for name in found for path in find_images(folder / name)]
