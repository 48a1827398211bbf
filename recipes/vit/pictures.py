"""A sheet of images with true and predicted classes."""

from __future__ import annotations

__all__ = ["draw_predictions"]

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from pl_normkit.recipes.image_files import to_picture

_SIDE = 96
_GAP = 6
_LINE = 14
_COLUMNS = 6
_RIGHT = (120, 220, 120)
_WRONG = (255, 110, 90)


def draw_predictions(images: Tensor, labels: Tensor, shares: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Write a PNG of images with the predicted class and its probability below, and the true class where it is another.

    Args:
        images: (N, channels, H, W) uint8.
        labels: (N,) true classes.
        shares: (N, classes) probabilities.
        class_names: one name per class.
        path: file to write; its folder is made.
    """
    rows = -(-len(images) // _COLUMNS)
    height = _SIDE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (_GAP + _COLUMNS * (_SIDE + _GAP), _GAP + rows * height), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for index, (image, label, share) in enumerate(zip(images, labels.tolist(), shares, strict=True)):
        x, y = _GAP + index % _COLUMNS * (_SIDE + _GAP), _GAP + index // _COLUMNS * height
        sheet.paste(to_picture(image, (_SIDE, _SIDE)), (x, y))
        guess = int(share.argmax())
        pen.text((x, y + _SIDE), f"{class_names[guess][:10]} {share[guess]:.2f}", fill=_RIGHT if guess == label else _WRONG)
        if guess != label:
            pen.text((x, y + _SIDE + _LINE), f"is {class_names[label][:12]}", fill=(255, 255, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
