"""The effective receptive field of the network before and after training."""

from __future__ import annotations

__all__ = ["FieldRecorder"]

from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from pl_normkit.errors import NormkitError
from pl_normkit.receptive_field import ReceptiveField, compare_receptive_fields, effective_receptive_field


class FieldRecorder(Callback):
    """Measures the effective receptive field on validation images when a fit begins, and again when `finish` is called.

    Args:
        images: number of validation images; 0 switches it off.

    Attributes:
        fields: "before training", then "after training".
        reason: why there is none, where there is none. A network whose field cannot be measured still trains.
    """

    def __init__(self, images: int = 32) -> None:
        self.images = images
        self.fields: dict[str, ReceptiveField] = {}
        self.reason = ""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.fields = {}
        self.reason = ""
        if self.images <= 0:
            self.reason = "--field.images is 0"
        elif isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            self.reason = "the weights are sharded"
        else:
            self._measure("before training", trainer, pl_module)

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule, path: Path) -> None:
        """Measure again, and draw both into the PNG `path`."""
        if self.reason or not trainer.is_global_zero:
            return
        self._measure("after training", trainer, pl_module)
        try:
            compare_receptive_fields(self.fields, path)
        except NormkitError as error:
            self.reason = error.what

    def _measure(self, title: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        try:
            network = cast(nn.Module, pl_module.network)
            self.fields[title] = effective_receptive_field(network, self._take_images(trainer))
        except NormkitError as error:
            self.reason = error.what

    def _take_images(self, trainer: L.Trainer) -> Tensor:
        data: L.LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        taken: list[Tensor] = []
        for batch in data.val_dataloader():
            taken += data.on_before_batch_transfer(batch, 0)[0]
            if len(taken) >= self.images:
                break
        return torch.stack(taken[: self.images])
