"""Where a run writes, and what the writers of predictions share."""

from __future__ import annotations

__all__ = ["FileWriter", "FolderWriter", "PredictionsWriter", "log_folder"]

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


def log_folder(trainer: L.Trainer) -> Path:
    """Where rank zero writes, also once the other processes are gone: `trainer.log_dir` is broadcast and would wait for them."""
    logger = trainer.loggers[0] if trainer.loggers else None
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(folder or trainer.default_root_dir)


class PredictionsWriter(BasePredictionWriter):
    """Writes predictions batch by batch."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    @abstractmethod
    def write(self, trainer: L.Trainer, module: L.LightningModule, prediction: Any, batch: Any) -> None:
        """Write what was predicted for a batch."""

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.write(trainer, pl_module, prediction, batch)


class FolderWriter(PredictionsWriter):
    """A file for each sample, in one folder.

    Args:
        output_dir: the folder; None takes `default_name` in the run's log folder.
    """

    default_name: str

    def __init__(self, output_dir: str | None = None) -> None:
        super().__init__()
        self.output_dir = Path(output_dir) if output_dir is not None else None

    def find_folder(self, trainer: L.Trainer) -> Path:
        """Where the predictions of this run go."""
        return self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / self.default_name


class FileWriter(PredictionsWriter):
    """One file for all samples.

    Args:
        output_file: the file; None takes `default_name` in the run's log folder. Each process writes a file of its own.
    """

    default_name: str

    def __init__(self, output_file: str | None = None) -> None:
        super().__init__()
        self.output_file = Path(output_file) if output_file is not None else None

    def find_file(self, trainer: L.Trainer) -> Path:
        """Where the predictions of this process go."""
        path = self.output_file or Path(trainer.log_dir or trainer.default_root_dir) / self.default_name
        return path if trainer.world_size == 1 else path.with_stem(f"{path.stem}_{trainer.global_rank}")

    def begin_file(self, trainer: L.Trainer, head: str = "") -> None:
        """Start the file anew, with `head`; its folder is made."""
        path = self.find_file(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head, encoding="utf-8", newline="")
