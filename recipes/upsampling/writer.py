"""Write predicted maps to files."""

from __future__ import annotations

__all__ = ["MapWriter"]

from typing import Any, Literal

import lightning as L

from pl_normkit.recipes.upsampling.maps import write_map
from pl_normkit.recipes.upsampling.samples import Batch
from pl_normkit.recipes.writing import FolderWriter


class MapWriter(FolderWriter):
    """Each predicted map under the name of its image, in the units of its coarse map.

    Args:
        output_dir: folder for the maps; None takes `maps/` in the run's log folder.
        suffix: ".tif" and ".npy" hold float32, ".png" numbers rounded to 16 bits.
    """

    default_name = "maps"

    def __init__(self, output_dir: str | None = None, suffix: Literal[".tif", ".npy", ".png"] = ".tif") -> None:
        super().__init__(output_dir)
        self.suffix = suffix

    def write(self, trainer: L.Trainer, module: L.LightningModule, prediction: Any, batch: Batch) -> None:
        for values, name in zip(prediction, batch.names, strict=True):
            write_map(values[0], self.find_folder(trainer) / f"{name}{self.suffix}")
