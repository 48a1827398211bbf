"""The effective receptive field of the network before and after edits and training."""

from __future__ import annotations

__all__ = ["FieldRecorder", "finish_field"]

import copy
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch import nn

from pl_normkit.errors import NormkitError
from pl_normkit.receptive_field import ReceptiveField, compare_receptive_fields, effective_receptive_field
from pl_normkit.recipes.editing import editing_callbacks
from pl_normkit.recipes.loading import RecipeData


class FieldRecorder(Callback):
    """Measures the effective receptive field on validation images when a fit begins, and again when `finish` is called.

    Where callbacks that come later in the Trainer's list edit the network, the field from before that is measured too, on a copy.

    Args:
        images: number of validation images; 0 switches it off.

    Attributes:
        fields: "before the edits" where these change the field, "before training", then "after training".
        reason: why there is none, where there is none. A network whose field cannot be measured still trains.
    """

    def __init__(self, images: int = 32) -> None:
        self.images = images
        self.fields: dict[str, ReceptiveField] = {}
        self.reason = ""
        self._unedited: nn.Module | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        is_wanted = stage == "fit" and trainer.is_global_zero and self.images > 0
        self._unedited = copy.deepcopy(_network(pl_module)) if is_wanted and editing_callbacks(trainer) else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.fields = {}
        self.reason = ""
        unedited, self._unedited = self._unedited, None
        if self.images <= 0:
            self.reason = "--field.images is 0"
        elif isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            self.reason = "the weights are sharded"
        elif trainer.is_global_zero:
            is_edited = any(callback.changes for callback in editing_callbacks(trainer))
            if unedited is not None and is_edited and not trainer.ckpt_path:  # of a resumed run the copy has random weights
                self._measure("before the edits", trainer, unedited.to(pl_module.device))
            self._measure("before training", trainer, _network(pl_module))
            self._drop_equal()

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule, path: Path) -> None:
        """Measure again, and draw all into the PNG `path`."""
        if self.reason or not trainer.is_global_zero:
            return
        self._measure("after training", trainer, _network(pl_module))
        try:
            compare_receptive_fields(self.fields, path)
        except NormkitError as error:
            self.reason = error.what

    def _measure(self, title: str, trainer: L.Trainer, network: nn.Module) -> None:
        data = cast(RecipeData[Any], trainer.datamodule)  # type: ignore[attr-defined]
        try:
            self.fields[title] = effective_receptive_field(network, data.sample_images(self.images))
        except NormkitError as error:
            self.reason = error.what

    def _drop_equal(self) -> None:
        """Edits that leave the field alone need no picture."""
        unedited, edited = self.fields.get("before the edits"), self.fields.get("before training")
        if unedited is not None and edited is not None and torch.allclose(unedited.map, edited.map, rtol=1e-3, atol=1e-9):
            del self.fields["before the edits"]


def _network(pl_module: L.LightningModule) -> nn.Module:
    return cast(nn.Module, pl_module.network)


def finish_field(trainer: L.Trainer, pl_module: L.LightningModule, path: Path, console: Console) -> dict[str, Path]:
    """Draw the field into the PNG `path` and say how far the network looks; the picture by its title, where there is one."""
    recorder = next((callback for callback in trainer.callbacks if isinstance(callback, FieldRecorder)), None)  # type: ignore[attr-defined]
    if recorder is None:
        return {}
    recorder.finish(trainer, pl_module, path)
    if recorder.reason:
        console.print(f"field:      none ({recorder.reason})", soft_wrap=True, highlight=False)
        return {}
    radii = ", ".join(f"{field.radius_holding(0.5):.2f} px {title}" for title, field in recorder.fields.items())
    console.print(f"field:      half of the mass within {radii}; {path}", soft_wrap=True, highlight=False)
    return {"effective receptive field": path}
