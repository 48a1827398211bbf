"""What a run ends with: the table of methods, findings, checkpoint and a sheet of maps."""

from __future__ import annotations

__all__ = ["print_scores", "summarize_fit"]

from functools import partial
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from pl_normkit.recipes.outcome import finish_fit
from pl_normkit.recipes.upsampling.data import UpsamplingData
from pl_normkit.recipes.upsampling.model import UpsamplingModule
from pl_normkit.recipes.upsampling.pictures import draw_maps
from pl_normkit.recipes.upsampling.resample import enlarge
from pl_normkit.recipes.upsampling.scores import BORDER

_ROWS = 4


def print_scores(console: Console, module: UpsamplingModule, title: str) -> None:
    """RMSE of every method in one table; for label maps the share of wrong pixels in another."""
    about = f"{title}: {module.task}, {BORDER} px border left out, mean over images"
    module.table.print(console, f"RMSE, {about}")
    if module.classes:
        module.wrong.print(console, f"share of wrong pixels, {about}")


def summarize_fit(trainer: L.Trainer, module: UpsamplingModule, data: UpsamplingData, console: Console) -> None:
    """Print the result of a fit; rank zero prints and draws, the others do nothing."""
    if not trainer.is_global_zero:
        return
    if module.table.values:
        print_scores(console, module, f"validation after {trainer.global_step} steps")
    finish_fit(trainer, module, partial(_draw_validation, module, data) if "val" in data.sources else None, console)


@torch.no_grad()
def _draw_validation(module: UpsamplingModule, data: UpsamplingData, path: Path) -> None:
    samples: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    training = module.training
    module.eval()
    for batch in data.val_dataloader():
        batch = data.on_before_batch_transfer(batch, 0)
        found = module(batch.guidance.to(module.device), batch.start.to(module.device)).float().cpu() * batch.span + batch.shift
        for index in range(len(batch.names)):
            truth = batch.truth[index]
            maps = (truth, enlarge(batch.coarse[index], (truth.shape[-2], truth.shape[-1])), found[index])
            truth, bicubic, sharp = (_one_plane(values, bool(module.classes)) for values in maps)
            samples.append((batch.guidance[index], truth, bicubic, sharp))
        if len(samples) >= _ROWS:
            break
    module.train(training)
    draw_maps(samples[:_ROWS], module.method, path)


def _one_plane(values: Tensor, is_labels: bool) -> Tensor:
    """(C, H, W) to (H, W): the class of label maps, NaN where unknown."""
    return torch.where(values[0].isfinite(), values.nan_to_num(-1).argmax(0).float(), torch.nan) if is_labels else values[0]
