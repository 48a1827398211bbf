"""Write predicted classes to a CSV file."""

from __future__ import annotations

__all__ = ["PredictionWriter"]

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor


class PredictionWriter(BasePredictionWriter):
    """One line per image: its name, the likeliest class and its probability.

    Args:
        output_file: CSV to write; None takes `predictions.csv` in the run's log folder. Each process writes a file of its own.
    """

    def __init__(self, output_file: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output_file = Path(output_file) if output_file is not None else None

    def find_file(self, trainer: L.Trainer) -> Path:
        """Where the predictions of this process go."""
        path = self.output_file or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.csv"
        return path if trainer.world_size == 1 else path.with_stem(f"{path.stem}_{trainer.global_rank}")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self.find_file(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, "w", [["name", "class", "probability"]])

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: tuple[Tensor, list[str]],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        class_names: list[str] = pl_module.class_names  # type: ignore[assignment]
        shares, labels = prediction.max(-1)
        rows = zip(batch[1], labels.tolist(), shares.tolist(), strict=True)
        self._write(self.find_file(trainer), "a", [[name, class_names[label], f"{share:.4f}"] for name, label, share in rows])

    def _write(self, path: Path, mode: str, rows: Sequence[Sequence[str]]) -> None:
        with path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
