"""What a fit logs along its way, kept for the page at its end: no logger need be there."""

from __future__ import annotations

__all__ = ["FitHistory", "Validation"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from pl_normkit.recipes.module import RecipeModule

_MOST_POINTS = 400


@dataclass(frozen=True)
class Validation:
    """One validation of a fit.

    Attributes:
        step: optimizer steps that had been taken.
        metrics: all that had been logged by its end.
        tables: what the module's `score_tables` gave.
    """

    step: int
    metrics: Mapping[str, float]
    tables: Mapping[str, Mapping[str, float]]


class FitHistory(Callback):
    """Keeps every validation of a fit, which of them the best checkpoint is of, and what training steps logged as `train_...`.

    Of a long fit every second, fourth, ... step is kept, at most 400 in all; their tensors stay on their device until they are read.

    Attributes:
        validations: in order, without the sanity check.
        best: the one that the best checkpoint belongs to; None where no checkpoint was written since this fit began.
    """

    def __init__(self) -> None:
        self.validations: list[Validation] = []
        self.best: Validation | None = None
        self._best_path = ""
        self._stride = 1
        self._steps: dict[int, dict[str, float | Tensor]] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._best_path = _best_path(trainer)  # of a resumed run, the best of the run before

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.find_best(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        tables: Mapping[str, Mapping[str, float]] = pl_module.score_tables() if isinstance(pl_module, RecipeModule) else {}
        self.validations.append(Validation(trainer.global_step, metrics, tables))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self._stride or not trainer.is_global_zero:
            return
        logged = {name: value.detach() for name, value in trainer.callback_metrics.items() if name.startswith("train_")}
        self._steps[step] = {**logged, "learning rate": trainer.optimizers[0].param_groups[0]["lr"]} if trainer.optimizers else {**logged}
        if len(self._steps) > _MOST_POINTS:
            self._stride *= 2
            self._steps = {step: found for step, found in self._steps.items() if step % self._stride == 0}

    def find_best(self, trainer: L.Trainer) -> None:
        """A checkpoint that is better than all before was written since the last validation: it is the best now."""
        path = _best_path(trainer)
        if path != self._best_path and self.validations:
            self._best_path, self.best = path, self.validations[-1]

    def learning_curves(self) -> dict[str, list[tuple[float, float]]]:
        """(step, value) pairs of each metric of training and validation; names with a "/" are parts of others and left out."""
        found: dict[str, list[tuple[float, float]]] = {}
        for step, logged in self._steps.items():
            for name, value in logged.items():
                found.setdefault(name, []).append((step, float(value)))
        for validation in self.validations:
            for name, value in validation.metrics.items():
                if "/" not in name and not name.startswith("train_"):
                    found.setdefault(name, []).append((validation.step, value))
        return found


def _best_path(trainer: L.Trainer) -> str:
    checkpoint = trainer.checkpoint_callback
    return checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
