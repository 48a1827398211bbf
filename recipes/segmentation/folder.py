"""Find and pair the files of a folder data set."""

from __future__ import annotations

__all__ = ["pair_files", "read_class_names"]

from collections.abc import Sequence
from pathlib import Path

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import name_images, require_folder
from pl_normkit.recipes.segmentation.files import Pair, require_masks

_LAYOUT = "put the images into images/ and the masks, under the same names, into masks/"


def read_class_names(root: Path, classes: Sequence[str] | str | None, least: int = 2) -> list[str]:
    """The class names themselves, or those in a text file, one a line; None reads `root/classes.txt`.

    Raises DataError for a missing or empty file, fewer than `least` classes, an empty name or one that occurs twice.
    """
    if classes is not None and not isinstance(classes, str):
        return _check_class_names(list(classes), "--data.classes", least)
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
    return _check_class_names([line.strip() for line in lines], str(path), least)


def _check_class_names(names: list[str], where: str, least: int) -> list[str]:
    fix = "write one class name a line, in the order of the mask values, and the background too"
    if len(names) < least:
        raise DataError(
            f"a class list needs at least {('one class', 'two classes')[least - 1]}",
            where=where,
            evidence=f"it has {len(names)}: {names}",
            fix=fix,
        )
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
