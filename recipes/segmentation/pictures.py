"""Masks as colours: palette PNGs and a sheet of images beside truth and prediction."""

from __future__ import annotations

__all__ = ["class_colours", "colour_mask", "draw_sheet", "save_palette_mask"]

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_IGNORED = (255, 255, 255)
_GAP = 6
_LINE = 16


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """`count` colours far apart in hue, alternating in lightness."""
    colours = []
    for index in range(count):
        red, green, blue = colorsys.hsv_to_rgb((index * 0.61803) % 1.0, 0.75, (0.95, 0.65)[index % 2])
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours


def colour_mask(mask: Tensor, count: int) -> Tensor:
    """Labels (H, W) to colours (3, H, W) uint8; values that are no class turn white."""
    table = torch.tensor([*class_colours(count), _IGNORED], dtype=torch.uint8)
    known = (mask >= 0) & (mask < count)
    return table[torch.where(known, mask, count)].permute(2, 0, 1)


def save_palette_mask(mask: Tensor, path: Path, count: int) -> None:
    """Write labels (H, W) as a one-channel PNG of class indices: with a palette up to 256 classes, else 16 bits deep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if count > 256:
        Image.fromarray(mask.numpy().astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(mask.numpy().astype(np.uint8))
    palette = [channel for colour in class_colours(count) for channel in colour]
    picture.putpalette(palette + [255] * (768 - len(palette)))
    picture.save(path)


def draw_sheet(images: Tensor, truths: Tensor, predictions: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Write a PNG with one row a sample: image, truth, prediction; and a legend of the classes below.

    Args:
        images: (N, 3, H, W) uint8.
        truths: (N, H, W) labels.
        predictions: (N, H, W) labels.
        class_names: one name per class.
        path: file to write; its folder is made.
    """
    count, _, height, width = images.shape
    sheet_width = 3 * width + 4 * _GAP
    columns = max(sheet_width // 110, 1)
    legend_height = -(-len(class_names) // columns) * _LINE + _GAP
    sheet = Image.new("RGB", (sheet_width, _LINE + count * (height + _GAP) + legend_height), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "truth", "prediction")):
        pen.text((_GAP + column * (width + _GAP), 2), title, fill=(255, 255, 255))
    for row in range(count):
        cells = (images[row], colour_mask(truths[row], len(class_names)), colour_mask(predictions[row], len(class_names)))
        for column, cell in enumerate(cells):
            corner = (_GAP + column * (width + _GAP), _LINE + row * (height + _GAP))
            sheet.paste(Image.fromarray(cell.permute(1, 2, 0).numpy()), corner)
    _draw_legend(pen, class_names, columns, _LINE + count * (height + _GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _draw_legend(pen: ImageDraw.ImageDraw, class_names: Sequence[str], columns: int, top: int) -> None:
    for index, (name, colour) in enumerate(zip(class_names, class_colours(len(class_names)), strict=True)):
        x, y = _GAP + index % columns * 110, top + index // columns * _LINE
        pen.rectangle((x, y + 2, x + 10, y + 12), fill=colour)
        pen.text((x + 15, y + 1), name[:14], fill=(255, 255, 255))
