"""Write predicted classes to a CSV file."""

from __future__ import annotations

__all__ = ["PredictionWriter"]

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from pl_normkit.recipes.writing import FileWriter


class PredictionWriter(FileWriter):
    """One line per image: its name, the likeliest class and its probability.

    Args:
        output_file: CSV to write; None takes `predictions.csv` in the run's log folder. Each process writes a file of its own.
    """

    default_name = "predictions.csv"

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
