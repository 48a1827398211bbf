"""What a run ends with: accuracy, findings, checkpoint and pictures."""

from __future__ import annotations

__all__ = ["print_accuracy", "summarize_fit"]

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning as L
import torch
from rich.console import Console

from pl_normkit.recipes.outcome import finish_fit
from pl_normkit.recipes.vit.data import ClassificationData
from pl_normkit.recipes.vit.model import ClassifierModule
from pl_normkit.recipes.vit.pictures import draw_predictions

_COUNT = 24


def print_accuracy(console: Console, accuracy: Mapping[str, float], title: str) -> None:
    """Top-1 accuracy and its mean over the classes."""
    text = f"{accuracy['acc']:.4f} top-1, {accuracy['acc_macro']:.4f} mean over the classes"
    console.print(f"accuracy:   {text} ({title})", highlight=False, soft_wrap=True)


def summarize_fit(trainer: L.Trainer, module: ClassifierModule, data: ClassificationData, console: Console) -> None:
    """Print the result of a fit; rank zero prints and draws, the others do nothing."""
    if not trainer.is_global_zero:
        return
    if module.accuracy:
        print_accuracy(console, module.accuracy, f"validation after {trainer.global_step} steps")
    finish_fit(trainer, module, partial(_draw_validation, module, data), console)


@torch.no_grad()
def _draw_validation(module: ClassifierModule, data: ClassificationData, path: Path) -> None:
    images, labels = data.on_before_batch_transfer(next(iter(data.val_dataloader())), 0)
    training = module.training
    module.eval()
    shares = module(images[:_COUNT].to(module.device, next(module.parameters()).dtype)).float().softmax(-1).cpu()
    module.train(training)
    draw_predictions(data.normalization.undo(images[:_COUNT]), labels[:_COUNT], shares, module.class_names, path)
