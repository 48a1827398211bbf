"""Write predicted masks to files."""

from __future__ import annotations

__all__ = ["MaskWriter"]

from typing import Any

import lightning as L
from torch import Tensor

from pl_normkit.recipes.segmentation.pictures import save_palette_mask
from pl_normkit.recipes.writing import FolderWriter


class MaskWriter(FolderWriter):
    """Each predicted mask as a palette PNG under the name of its image, at the size of its image.

    Args:
        output_dir: folder for the masks; None takes `masks/` in the run's log folder.
    """

    default_name = "masks"

    def write(self, trainer: L.Trainer, module: L.LightningModule, prediction: Any, batch: tuple[Tensor, list[str], Tensor]) -> None:
        _, names, sizes = batch
        folder = self.find_folder(trainer)
        class_names: list[str] = module.class_names  # type: ignore[assignment]
        for labels, name, (height, width) in zip(prediction.cpu(), names, sizes.tolist(), strict=True):
            save_palette_mask(labels[:height, :width], folder / f"{name}.png", len(class_names))
