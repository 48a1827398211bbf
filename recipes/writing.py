"""Where a run writes, and what the writers of one file of predictions share."""

from __future__ import annotations

__all__ = ["FileWriter", "log_folder"]

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


def log_folder(trainer: L.Trainer) -> Path:
    """Where rank zero writes, also once the other processes are gone: `trainer.log_dir` is broadcast and would wait for them."""
    logger = trainer.loggers[0] if trainer.loggers else None
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(folder or trainer.default_root_dir)


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
