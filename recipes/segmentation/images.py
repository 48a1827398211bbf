"""Read mask files; whatever is wrong with one is a DataError that names the file."""

from __future__ import annotations

__all__ = ["NO_LABEL", "MaskCode", "mask_size", "read_mask"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import decode_picture, open_picture

_MASK_MODES = ("P", "L", "1", "I;16", "I")
NO_LABEL = -(2**31)
"""Stands for a stored value that must not occur."""


@dataclass(frozen=True)
class MaskCode:
    """How mask files store labels.

    Attributes:
        class_names: one name per label.
        ignore_index: label of pixels that do not count.
        table: the label of each stored value from 0 up, NO_LABEL where one must not occur; None where files store the labels.
        values: says in words which values may occur, where `table` is given.
        mode: PIL mode the pixels are converted to; None for one-channel files as they are.
    """

    class_names: Sequence[str]
    ignore_index: int
    table: tuple[int, ...] | None = None
    values: str = ""
    mode: str | None = None

    def decode(self, stored: Tensor) -> Tensor:
        """Stored values (H, W) to labels (H, W), int64; NO_LABEL for a value that must not occur."""
        values = stored.long()
        if self.table is not None:
            known = (values >= 0) & (values < len(self.table))
            return torch.tensor(self.table)[values * known].masked_fill(~known, NO_LABEL)
        known = ((values >= 0) & (values < len(self.class_names))) | (values == self.ignore_index)
        return values.masked_fill(~known, NO_LABEL)

    def explain(self) -> str:
        """What the files should hold."""
        count = len(self.class_names)
        if self.table is not None:
            return f"masks of this data set hold {self.values}; take the file from the original data set"
        return (
            f"there are {count} classes: use 0 to {count - 1}, or {self.ignore_index} for pixels to ignore; "
            "or add the missing classes to the class list, or set --data.ignore_index"
        )


def mask_size(path: Path, code: MaskCode) -> tuple[int, int]:
    """(height, width) from the header of the file alone. Raises DataError when it cannot be read or has colour channels."""
    with open_picture(path, "mask") as picture:
        if code.mode is None and picture.mode not in _MASK_MODES:
            raise DataError(
                "a mask does not hold class indices",
                where=str(path),
                evidence=f"its pixels are {picture.mode} ({len(picture.getbands())} channels)",
                fix="save it as a one-channel PNG (grey or palette) whose pixel values are the class indices",
            )
        return picture.height, picture.width


def read_mask(path: Path, code: MaskCode) -> Tensor:
    """Labels (H, W), int64, from a grey or palette file.

    Raises DataError when the file cannot be read, has colour channels, or holds a value that `code` does not know.
    """
    stored = decode_picture(path, "mask", code.mode)
    if stored.ndim != 2:
        mask_size(path, code)
    labels = code.decode(stored)
    wrong = labels == NO_LABEL
    if bool(wrong.any()):
        raise _out_of_range(stored, wrong, path, code)
    return labels


def _out_of_range(stored: Tensor, wrong: Tensor, path: Path, code: MaskCode) -> DataError:
    row, column = wrong.nonzero()[0].tolist()
    first = int(stored[row, column])
    others = [value for value in torch.unique(stored.long()[wrong]).tolist() if value != first][:8]
    return DataError(
        "a mask holds a class out of range",
        where=f"{path}, row {row}, column {column}",
        evidence=f"value {first}, in {int(wrong.sum())} of {stored.numel()} pixels; other wrong values: {others}",
        fix=code.explain(),
    )
