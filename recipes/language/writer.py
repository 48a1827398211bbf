"""Write generated texts to a file."""

from __future__ import annotations

__all__ = ["TextWriter"]

from typing import Any

import lightning as L

from pl_normkit.recipes.writing import FileWriter


class TextWriter(FileWriter):
    """The texts one after the other, each under a line with its number.

    Args:
        output_file: file to write; None takes `samples.txt` in the run's log folder. Each process writes a file of its own.
    """

    default_name = "samples.txt"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin_file(trainer)

    def write(self, trainer: L.Trainer, module: L.LightningModule, prediction: Any, batch: Any) -> None:
        decode = trainer.datamodule.vocabulary.decode  # type: ignore[attr-defined]
        with self.find_file(trainer).open("a", encoding="utf-8") as file:
            for number, tokens in zip(batch[0].tolist(), prediction, strict=True):
                file.write(f"--- {number}\n{decode(tokens)}\n")
