"""Write samples as one picture and as an array."""

from __future__ import annotations

__all__ = ["SampleWriter", "draw_samples"]

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from pl_normkit.recipes.image_files import to_picture
from pl_normkit.recipes.writing import FileWriter

_SIDE = 64


class SampleWriter(FileWriter):
    """A PNG with all samples in rows, and beside it the same as an array (N, channels, H, W) uint8 (.npy).

    Args:
        output_file: PNG to write; None takes `samples.png` in the run's log folder. Each process writes files of its own.
    """

    default_name = "samples.png"

    def __init__(self, output_file: str | None = None) -> None:
        super().__init__(output_file)
        self._found: list[Tensor] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._found = []

    def write(self, trainer: L.Trainer, module: L.LightningModule, prediction: Any, batch: Any) -> None:
        self._found.append(prediction.cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path, images = self.find_file(trainer), torch.cat(self._found)
        self._found = []
        draw_samples(images, path)
        np.save(path.with_suffix(".npy"), images.numpy())


def draw_samples(images: Tensor, path: Path) -> None:
    """Write images (N, channels, H, W) uint8 as one PNG, about as many rows as columns; its folder is made."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    framed = torch.nn.functional.pad(images, (0, 1, 0, 1), value=96)
    missing = framed.new_full((rows * columns - len(images), *framed.shape[1:]), 96)
    _, channels, height, width = framed.shape
    sheet = torch.cat([framed, missing]).view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    sheet = sheet.reshape(channels, rows * height, columns * width)
    scale = max(_SIDE // height, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(sheet, (sheet.shape[2] * scale, sheet.shape[1] * scale)).save(path)
