"""Where predictions go: what the writers of one file share."""

from __future__ import annotations

__all__ = ["FileWriter"]

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


class FileWriter(BasePredictionWriter):
    """Writes predictions of a run into one file.

    Args:
        output_file: file to write; None takes `default_name` in the run's log folder. Each process writes a file of its own.
    """

    default_name: str

    def __init__(self, output_file: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output_file = Path(output_file) if output_file is not None else None

    def find_file(self, trainer: L.Trainer) -> Path:
        """Where the predictions of this process go."""
        path = self.output_file or Path(trainer.log_dir or trainer.default_root_dir) / self.default_name
        return path if trainer.world_size == 1 else path.with_stem(f"{path.stem}_{trainer.global_rank}")
