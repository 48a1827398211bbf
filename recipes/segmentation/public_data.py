"""Public data sets in the folders they are handed out in: PASCAL VOC, ADE20K, Cityscapes and STARE. Nothing is downloaded."""

from __future__ import annotations

__all__ = ["ADE20KData", "CityscapesData", "STAREData", "VOCData", "find_voc_base", "read_public_names"]

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import IMAGE_SUFFIXES, find_images, name_images, require_folder
from pl_normkit.recipes.loading import Part, require_option
from pl_normkit.recipes.segmentation.data import FilesData
from pl_normkit.recipes.segmentation.files import Pair, require_masks
from pl_normkit.recipes.segmentation.images import NO_LABEL, MaskCode
from pl_normkit.recipes.splitting import read_split_file

_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label ids of the 19 classes that are evaluated, in the order of their train ids."""


@cache
def read_public_names(data_set: str) -> list[str]:
    """The classes of a public data set, in the order of their labels."""
    names: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("class_names.yaml").read_text(encoding="utf-8"))
    return names[data_set]


def _find_base(root: Path, places: tuple[str, ...], needed: str) -> Path:
    """The folder that holds `needed`: `root`, or one of the `places` below it where the archive unpacks."""
    require_folder(root, "the data folder")
    for place in ("", *places):
        if (root / place / needed).is_dir():
            return root / place
    looked = ", ".join(str(root / place / needed) for place in ("", *places))
    raise DataError("the data set is not laid out as expected", where=str(root), evidence=f"none of {looked}", fix="give its folder")


def find_voc_base(root: Path) -> Path:
    """The folder of `JPEGImages` in an unpacked VOC 2012. Raises DataError."""
    return _find_base(root, ("VOC2012", "VOCdevkit/VOC2012"), "JPEGImages")


class VOCData(FilesData):
    """PASCAL VOC 2012: `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation/*.txt`.

    They are in `root`, `root/VOC2012` or `root/VOCdevkit/VOC2012`. 21 classes with the background; the border
    between objects, 255 in the masks, does not count.

    Args:
        root: see above.
        train_list, val_list: names of the lists in `ImageSets/Segmentation`, such as "train", "trainval" or "train_aug".
        mask_folder: where the masks are; "SegmentationClassAug" for the ones people add.
        options: see FilesData.

    Raises DataError for everything that is wrong with the folder.
    """

    def __init__(
        self, root: str, train_list: str = "train", val_list: str = "val", mask_folder: str = "SegmentationClass", **options: Any
    ) -> None:
        super().__init__(read_public_names("voc"), None, root, **options)
        self.lists: dict[Part, str] = {"train": train_list, "val": val_list}
        self.mask_folder = mask_folder

    def find_pairs(self) -> dict[Part, list[Pair]]:
        base = find_voc_base(self.root)
        require_folder(base / self.mask_folder, "the mask folder")
        images = name_images(base / "JPEGImages", "unpack the archive there")
        found: dict[Part, list[Pair]] = {}
        for part, list_name in self.lists.items():
            names = read_split_file(base / "ImageSets" / "Segmentation" / f"{list_name}.txt", images)
            found[part] = [Pair(name, images[name], base / self.mask_folder / f"{name}.png") for name in names]
            require_masks(found[part])
        return found


class ADE20KData(FilesData):
    """ADE20K, scene parsing challenge 2016: `images` and `annotations`, each with `training` and `validation`.

    They are in `root` or `root/ADEChallengeData2016`. 150 classes: the masks' 1 to 150 become 0 to 149, their 0 (other objects)
    does not count.

    Args:
        root: see above.
        options: see FilesData.

    Raises DataError for everything that is wrong with the folder.
    """

    def __init__(self, root: str, ignore_index: int = 255, **options: Any) -> None:
        names = read_public_names("ade20k")
        table = (ignore_index, *range(len(names)))
        code = MaskCode(names, ignore_index, table, values=f"0 for other objects and 1 to {len(names)} for the classes")
        super().__init__(names, code, root, ignore_index=ignore_index, **options)

    def find_pairs(self) -> dict[Part, list[Pair]]:
        base = _find_base(self.root, ("ADEChallengeData2016",), "images")
        folders: dict[Part, str] = {"train": "training", "val": "validation"}
        return {part: _pair_by_name(base / "images" / folder, base / "annotations" / folder) for part, folder in folders.items()}


def _pair_by_name(images: Path, masks: Path) -> list[Pair]:
    found = name_images(images, "unpack the archive there")
    require_folder(masks, "the mask folder", "unpack the archive there")
    pairs = [Pair(name, path, masks / f"{name}.png") for name, path in found.items()]
    require_masks(pairs)
    return pairs


class CityscapesData(FilesData):
    """Cityscapes, fine annotations: `leftImg8bit/{train,val}/CITY/*_leftImg8bit.png` and `gtFine/{train,val}/CITY/*_gtFine_labelIds.png`.

    19 classes; every other label id does not count. The test images have no public labels: tests run on the validation images.

    Args:
        root: holds the two folders.
        options: see FilesData.

    Raises DataError for everything that is wrong with the folder.
    """

    def __init__(self, root: str, ignore_index: int = 255, **options: Any) -> None:
        table = [ignore_index] * 34 + [NO_LABEL] * (255 - 34) + [ignore_index]  # -1, the licence plates, is 255 in 8 bits
        for label, stored in enumerate(_CITYSCAPES_IDS):
            table[stored] = label
        code = MaskCode(read_public_names("cityscapes"), ignore_index, tuple(table), values="label ids: 0 to 33, or 255 for -1")
        super().__init__(read_public_names("cityscapes"), code, root, ignore_index=ignore_index, **options)

    def find_pairs(self) -> dict[Part, list[Pair]]:
        base = _find_base(self.root, ("cityscapes",), "leftImg8bit")
        parts: tuple[Part, ...] = ("train", "val")
        return {part: self._pair(base / "leftImg8bit" / part, base / "gtFine" / part) for part in parts}

    def _pair(self, images: Path, masks: Path) -> list[Pair]:
        found = name_images(images, "unpack leftImg8bit_trainvaltest.zip there")
        require_folder(masks, "the mask folder", "unpack gtFine_trainvaltest.zip there")
        names = {name.removesuffix("_leftImg8bit"): path for name, path in found.items()}
        pairs = [Pair(name, path, masks / f"{name}_gtFine_labelIds.png") for name, path in names.items()]
        require_masks(pairs)
        return pairs


class STAREData(FilesData):
    """STARE retinal vessels: `stare-images/im0001.ppm` and `labels-ah/im0001.ah.ppm`, also as PNG or packed as .gz.

    Two classes, background and vessel. The first half of the images by name is for training, the rest for validation.

    Args:
        root: holds the two folders.
        annotator: "ah" or "vk", whose labels are taken: those in `labels-ah` or in `labels-vk`.
        val_share: share of the images for validation, the last ones by name.
        options: see FilesData.

    Raises DataError for everything that is wrong with the folder.
    """

    def __init__(self, root: str, annotator: Literal["ah", "vk"] = "ah", val_share: float = 0.5, **options: Any) -> None:
        names = read_public_names("stare")
        code = MaskCode(
            names, options.get("ignore_index", 255), (0,) * 128 + (1,) * 128, values="dark background and bright vessels", mode="L"
        )
        super().__init__(names, code, root, **options)
        require_option(0 < val_share < 1, "val_share", val_share, "take a share between 0 and 1")
        self.annotator = annotator
        self.val_share = val_share

    def find_pairs(self) -> dict[Part, list[Pair]]:
        images = _name_packed(self.root / "stare-images", "")
        masks = _name_packed(self.root / f"labels-{self.annotator}", f".{self.annotator}")
        labels = self.root / f"labels-{self.annotator}"
        pairs = [Pair(name, path, masks.get(name, labels / f"{name}.{self.annotator}.ppm")) for name, path in images.items()]
        require_masks(pairs)
        if len(pairs) < 2:
            raise DataError("one image cannot be split into training and validation", where=str(self.root), fix="add the other images")
        held_out = min(max(round(len(pairs) * self.val_share), 1), len(pairs) - 1)
        return {"train": pairs[:-held_out], "val": pairs[-held_out:]}


def _name_packed(folder: Path, ending: str) -> dict[str, Path]:
    """Images under their names without `ending` and suffixes."""
    require_folder(folder, "the image folder" if not ending else "the mask folder", "give the folder that holds stare-images and labels-ah")
    suffixes = (".ppm", ".ppm.gz", *IMAGE_SUFFIXES)
    return {path.name.partition(".")[0]: path for path in find_images(folder, suffixes) if f"{ending}." in path.name}
