"""What a run ends with: the distance of its samples to real images, findings, checkpoint and samples."""

from __future__ import annotations

__all__ = ["print_scores", "summarize_fit"]

from functools import partial
from pathlib import Path

import lightning as L
import torch
from rich.console import Console

from pl_normkit.recipes.diffusion.data import DigitImages
from pl_normkit.recipes.diffusion.model import DiffusionModule
from pl_normkit.recipes.diffusion.writer import draw_samples
from pl_normkit.recipes.outcome import finish_fit

_COUNT = 64


def print_scores(console: Console, module: DiffusionModule, data: DigitImages, title: str) -> None:
    """The Frechet distance, the loss, and what the distance is measured with."""
    scorer = data.scorer
    floor = "" if scorer is None else f"; training images get {scorer.floor:.3f} on the validation images"
    text = f"{module.scores['frechet']:.3f} from the samples to real images, loss {module.scores['loss']:.4f} ({title}{floor})"
    console.print(f"distance:   {text}", highlight=False, soft_wrap=True)
    if scorer is not None:
        text = f"{scorer.accuracy:.4f} top-1 on the validation images, for the distance alone"
        console.print(f"classifier: {text}", highlight=False, soft_wrap=True)


def summarize_fit(trainer: L.Trainer, module: DiffusionModule, data: DigitImages, console: Console) -> None:
    """Print the result of a fit; rank zero prints and draws, the others do nothing."""
    if not trainer.is_global_zero:
        return
    if module.scores:
        print_scores(console, module, data, f"validation after {trainer.global_step} steps")
    finish_fit(trainer, module, partial(_draw, module), console, sheet="samples")


@torch.no_grad()
def _draw(module: DiffusionModule, path: Path) -> None:
    training = module.training
    module.eval()
    images = module.predict_step([torch.arange(_COUNT)], 0)
    module.train(training)
    draw_samples(images.cpu(), path)
