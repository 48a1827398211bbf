"""A sheet of training images with boxes, attention, both label maps, where they differ, and what the segmenter says."""

from __future__ import annotations

__all__ = ["draw_boxes", "draw_labels"]

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_normkit.recipes.boxes.annotations import Boxes
from pl_normkit.recipes.segmentation.pictures import class_colours, colour_mask
from pl_normkit.recipes.sheets import draw_sheet, paint_values


class LabelledImage(NamedTuple):
    """What a row shows: image (3, H, W) uint8, its boxes, A (h, w) in [0, 1] or None, two label maps and a prediction (H, W)."""

    image: Tensor
    found: Boxes
    attention: Tensor | None
    first: Tensor
    second: Tensor
    prediction: Tensor


def draw_boxes(image: Tensor, found: Boxes, count: int) -> Tensor:
    """The image with a line of its class's colour along each box."""
    picture, colours = image.clone(), class_colours(count)
    height, width = image.shape[-2:]
    for box, label in zip(found.boxes.round().int().tolist(), found.labels.tolist(), strict=True):
        left, top, right, bottom = box[0], box[1], min(box[2], width) - 1, min(box[3], height) - 1
        colour = torch.tensor(colours[label], dtype=torch.uint8)[:, None]
        for row in (top, bottom):
            picture[:, row, left : right + 1] = colour
        for column in (left, right):
            picture[:, top : bottom + 1, column] = colour
    return picture


def draw_labels(rows: Sequence[LabelledImage], class_names: Sequence[str], path: Path) -> None:
    """Write a PNG, a row an image; its folder is made."""
    count, sheet = len(class_names), []
    for row in rows:
        size = row.image.shape[-2:]
        attention = torch.full(size, torch.nan) if row.attention is None else F.interpolate(row.attention[None, None], size)[0, 0]
        differ = torch.where(row.first == row.second, 0.0, 1.0)
        maps = [colour_mask(labels.long(), count) for labels in (row.first, row.second)]
        pictures = [draw_boxes(row.image, row.found, count), paint_values(attention, 0, 1), *maps, paint_values(differ, 0, 1)]
        sheet.append([*pictures, colour_mask(row.prediction, count)])
    titles = ("image and boxes", "attention A", "first labels", "second labels", "disagreement", "prediction")
    draw_sheet(titles, sheet, path, list(zip(class_names, class_colours(count), strict=True)))
