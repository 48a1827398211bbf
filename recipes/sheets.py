"""Sheets of pictures: a row a sample, a titled column each, a legend below."""

from __future__ import annotations

__all__ = ["draw_sheet", "paint_values"]

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 6
_LINE = 16
_ENTRY = 110
_ANCHORS = torch.tensor([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=torch.float32)
"""Of the viridis colour map."""


def draw_sheet(
    titles: Sequence[str], rows: Sequence[Sequence[Tensor]], path: Path, legend: Sequence[tuple[str, tuple[int, int, int]]] = ()
) -> None:
    """Write a PNG.

    Args:
        titles: one a column.
        rows: pictures (3, H, W) uint8, of any sizes, one a column.
        path: file to write; its folder is made.
        legend: names with their colours.
    """
    width = max(picture.shape[-1] for row in rows for picture in row)
    tops = [_LINE]
    for row in rows:
        tops.append(tops[-1] + max(picture.shape[-2] for picture in row) + _GAP)
    sheet_width = len(titles) * (width + _GAP) + _GAP
    columns = max(sheet_width // _ENTRY, 1)
    legend_height = -(-len(legend) // columns) * _LINE + _GAP
    sheet = Image.new("RGB", (sheet_width, tops[-1] + legend_height), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((_GAP + column * (width + _GAP), 2), title, fill=(255, 255, 255))
    for top, row in zip(tops, rows, strict=False):
        for column, picture in enumerate(row):
            corner = (_GAP + column * (width + _GAP), top)
            sheet.paste(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()), corner)
    for index, (name, colour) in enumerate(legend):
        x, y = _GAP + index % columns * _ENTRY, tops[-1] + index // columns * _LINE
        pen.rectangle((x, y + 2, x + 10, y + 12), fill=colour)
        pen.text((x + 15, y + 1), name[:14], fill=(255, 255, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def paint_values(values: Tensor, low: float, high: float) -> Tensor:
    """Numbers (H, W) to colours (3, H, W) uint8, from dark violet at `low` to yellow at `high`; unknown ones are white."""
    known = values.isfinite()
    place = ((values.nan_to_num(low) - low) / max(high - low, 1e-12)).clamp(0, 1) * (len(_ANCHORS) - 1)
    lower = place.floor().long().clamp_max(len(_ANCHORS) - 2)
    share = (place - lower)[..., None]
    colours = _ANCHORS[lower] * (1 - share) + _ANCHORS[lower + 1] * share
    return torch.where(known[..., None], colours, 255.0).round().to(torch.uint8).permute(2, 0, 1)
