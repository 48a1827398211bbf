"""Read mask files; whatever is wrong with one is a DataError that names the file."""

from __future__ import annotations

__all__ = ["check_labels", "mask_size", "read_mask"]

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import decode_picture, open_picture

_MASK_MODES = ("P", "L", "1", "I;16", "I")


def mask_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header of the file alone. Raises DataError when it cannot be read or has colour channels."""
    with open_picture(path, "mask") as picture:
        if picture.mode not in _MASK_MODES:
            raise DataError(
                "a mask does not hold class indices",
                where=str(path),
                evidence=f"its pixels are {picture.mode} ({len(picture.getbands())} channels)",
                mend="save it as a one-channel PNG (grey or palette) whose pixel values are the class indices",
            )
        return picture.height, picture.width


def read_mask(path: Path, class_names: Sequence[str], ignore_index: int) -> Tensor:
    """Class indices (H, W), int64, from a grey or palette file.

    Raises DataError when the file cannot be read, has colour channels, or holds a value that is neither a class nor `ignore_index`.
    """
    mask = decode_picture(path, "mask", None)
    if mask.ndim != 2:
        mask_size(path)
    labels = mask.long()
    check_labels(labels, path, class_names, ignore_index)
    return labels


def check_labels(labels: Tensor, path: Path, class_names: Sequence[str], ignore_index: int) -> None:
    """Raise DataError naming the first pixel whose label is neither a class nor `ignore_index`; `labels` (H, W) int64."""
    count = len(class_names)
    wrong = ((labels < 0) | (labels >= count)) & (labels != ignore_index)
    if not bool(wrong.any()):
        return
    row, column = wrong.nonzero()[0].tolist()
    raise DataError(
        "a mask holds a class out of range",
        where=f"{path}, row {row}, column {column}",
        evidence=f"value {int(labels[row, column])}, in {int(wrong.sum())} of {labels.numel()} pixels; other wrong values: "
        f"{[value for value in torch.unique(labels[wrong]).tolist() if value != int(labels[row, column])][:8]}",
        mend=f"there are {count} classes: use 0 to {count - 1}, or {ignore_index} for pixels to ignore; "
        "or add the missing classes to the class list, or set --data.ignore_index",
    )
