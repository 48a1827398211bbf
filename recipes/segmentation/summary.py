"""What a run ends with: IoU per class, findings, checkpoint, a sheet of validation images, and a page with all."""

from __future__ import annotations

__all__ = ["print_iou", "summarize_fit"]

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pl_normkit.recipes.outcome import finish_fit
from pl_normkit.recipes.segmentation.data import SegmentationData
from pl_normkit.recipes.segmentation.model import SegmentationModule
from pl_normkit.recipes.segmentation.pictures import draw_masks
from pl_normkit.recipes.segmentation.samples import denormalize

_SHEET_ROWS = 6


def mean_iou(class_iou: Mapping[str, float]) -> float:
    """Mean over the classes that occur; NaN when none does."""
    values = [value for value in class_iou.values() if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def print_iou(console: Console, class_iou: Mapping[str, float], title: str) -> None:
    """A table of IoU per class and their mean."""
    console.print(f"{title}:", highlight=False)
    table = Table()
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, value in class_iou.items():
        table.add_row(name, "does not occur" if math.isnan(value) else f"{value:.3f}")
    table.add_section()
    table.add_row("mean (mIoU)", f"{mean_iou(class_iou):.3f}")
    console.print(table)


def summarize_fit(
    trainer: L.Trainer, module: SegmentationModule, data: SegmentationData, console: Console, pictures: Mapping[str, Path] | None = None
) -> None:
    """Print the result of a fit, and put more `pictures` by title on its page; rank zero does, the others do nothing."""
    if not trainer.is_global_zero:
        return
    if module.class_iou:
        print_iou(console, module.class_iou, f"validation after {trainer.global_step} steps")
    draw = partial(_draw_validation, module, data) if "val" in data.sources else None
    finish_fit(trainer, module, draw, console, more=pictures)


@torch.no_grad()
def _draw_validation(module: SegmentationModule, data: SegmentationData, path: Path) -> None:
    images: list[Tensor] = []
    truths: list[Tensor] = []
    predictions: list[Tensor] = []
    training = module.training
    module.eval()
    for batch in data.val_dataloader():
        batch_images, batch_masks = data.on_before_batch_transfer(batch, 0)
        predicted = module.predict_logits(batch_images.to(module.device)).argmax(1).cpu()
        images.extend(denormalize(batch_images))
        truths.extend(batch_masks)
        predictions.extend(predicted)
        if len(images) >= _SHEET_ROWS:
            break
    module.train(training)
    rows = range(min(len(images), _SHEET_ROWS))
    side = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
    draw_masks(
        torch.stack([_fit(images[row], side, 0) for row in rows]),
        torch.stack([_fit(truths[row], side, -1) for row in rows]),
        torch.stack([_fit(predictions[row], side, -1) for row in rows]),
        module.class_names,
        path,
    )


def _fit(tensor: Tensor, side: list[int], value: int) -> Tensor:
    height, width = tensor.shape[-2:]
    return F.pad(tensor, (0, side[1] - width, 0, side[0] - height), value=value)
