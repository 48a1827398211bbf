"""Write predicted classes to a CSV file."""

from __future__ import annotations

__all__ = ["PredictionWriter"]

import csv
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
        self.begin_file(trainer, "name,class,probability\r\n")

    def write(self, trainer: L.Trainer, module: L.LightningModule, prediction: Any, batch: tuple[Tensor, list[str]]) -> None:
        class_names: list[str] = module.class_names  # type: ignore[assignment]
        shares, labels = prediction.max(-1)
        with self.find_file(trainer).open("a", newline="", encoding="utf-8") as file:
            rows = zip(batch[1], labels.tolist(), shares.tolist(), strict=True)
            csv.writer(file).writerows([name, class_names[label], f"{share:.4f}"] for name, label, share in rows)
