"""Write predicted masks to files."""

from __future__ import annotations

__all__ = ["MaskWriter"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from pl_normkit.recipes.segmentation.pictures import save_palette_mask


class MaskWriter(BasePredictionWriter):
    """Each predicted mask as a palette PNG under the name of its image, at the size of its image.

    Args:
        output_dir: folder for the masks; None takes `masks/` in the run's log folder.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir) if output_dir is not None else None

    def find_folder(self, trainer: L.Trainer) -> Path:
        """Where the masks of this run go."""
        return self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "masks"

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: tuple[Tensor, list[str], Tensor],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        _, names, sizes = batch
        folder = self.find_folder(trainer)
        class_names: list[str] = pl_module.class_names  # type: ignore[assignment]
        for labels, name, (height, width) in zip(prediction.cpu(), names, sizes.tolist(), strict=True):
            save_palette_mask(labels[:height, :width], folder / f"{name}.png", len(class_names))
