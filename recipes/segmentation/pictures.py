"""Masks as colours: palette PNGs and a sheet of images beside truth and prediction."""

from __future__ import annotations

__all__ = ["class_colours", "colour_mask", "draw_masks", "save_palette_mask"]

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pl_normkit.recipes.sheets import draw_sheet

_IGNORED = (255, 255, 255)


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


def draw_masks(images: Tensor, truths: Tensor, predictions: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Write a PNG with one row a sample: image, truth, prediction; and a legend of the classes below.

    Args:
        images: (N, 3, H, W) uint8.
        truths: (N, H, W) labels.
        predictions: (N, H, W) labels.
        class_names: one name per class.
        path: file to write; its folder is made.
    """
    count = len(class_names)
    rows = [
        (image, colour_mask(truth, count), colour_mask(prediction, count))
        for image, truth, prediction in zip(images, truths, predictions, strict=True)
    ]
    draw_sheet(("image", "truth", "prediction"), rows, path, list(zip(class_names, class_colours(count), strict=True)))
