"""Read image and mask files; whatever is wrong with one is a DataError that names the file."""

from __future__ import annotations

__all__ = ["check_labels", "image_size", "read_gray", "read_image", "read_mask"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pl_normkit.errors import DataError

_MASK_MODES = ("P", "L", "1", "I;16", "I")


def _open(path: Path, kind: str) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, kind, error) from error


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    mend = "put the file there" if isinstance(error, FileNotFoundError) else "replace the file, or take it out of the data set"
    return DataError(f"the {kind} cannot be read", where=str(path), evidence=f"{type(error).__name__}: {error}", mend=mend)


def _decode(path: Path, kind: str, mode: str | None) -> Tensor:
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert(mode) if mode else picture))
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, kind, error) from error


def image_size(path: Path, kind: str) -> tuple[int, int]:
    """(height, width) from the header of the file alone. Raises DataError when it cannot be read or has a mode this recipe cannot use."""
    with _open(path, kind) as picture:
        if kind == "mask" and picture.mode not in _MASK_MODES:
            raise DataError(
                "a mask does not hold class indices",
                where=str(path),
                evidence=f"its pixels are {picture.mode} ({len(picture.getbands())} channels)",
                mend="save it as a one-channel PNG (grey or palette) whose pixel values are the class indices",
            )
        if kind == "image" and picture.mode in ("I", "I;16", "I;16B", "F"):
            raise DataError(
                "an image has more than 8 bits a channel",
                where=str(path),
                evidence=f"its pixels are {picture.mode}",
                mend="convert it to 8 bits; how to spread the values is your choice to make",
            )
        return picture.height, picture.width


def read_image(path: Path) -> Tensor:
    """RGB image (3, H, W), uint8. Raises DataError."""
    return _decode(path, "image", "RGB").permute(2, 0, 1).contiguous()


def read_gray(path: Path) -> Tensor:
    """Grey image (H, W), uint8. Raises DataError."""
    return _decode(path, "image", "L")


def read_mask(path: Path, class_names: Sequence[str], ignore_index: int) -> Tensor:
    """Class indices (H, W), int64, from a grey or palette file.

    Raises DataError when the file cannot be read, has colour channels, or holds a value that is neither a class nor `ignore_index`.
    """
    mask = _decode(path, "mask", None)
    if mask.ndim != 2:
        image_size(path, "mask")
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
