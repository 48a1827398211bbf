"""Write predicted maps to files."""

from __future__ import annotations

__all__ = ["MapWriter"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from pl_normkit.recipes.upsampling.maps import write_map
from pl_normkit.recipes.upsampling.samples import Batch


class MapWriter(BasePredictionWriter):
    """Each predicted map under the name of its image, in the units of its coarse map.

    Args:
        output_dir: folder for the maps; None takes `maps/` in the run's log folder.
        suffix: ".tif" and ".npy" hold float32, ".png" numbers rounded to 16 bits.
    """

    def __init__(self, output_dir: str | None = None, suffix: Literal[".tif", ".npy", ".png"] = ".tif") -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.suffix = suffix

    def find_folder(self, trainer: L.Trainer) -> Path:
        """Where the maps of this run go."""
        return self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "maps"

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for values, name in zip(prediction, batch.names, strict=True):
            write_map(values[0], self.find_folder(trainer) / f"{name}{self.suffix}")
