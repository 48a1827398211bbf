"""A LightningModule that trains a deformable kernel network to sharpen enlarged maps by an image."""

from __future__ import annotations

__all__ = ["UpsamplingModule"]

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.methods.guided_upsampling import DeformableKernelNetwork
from pl_normkit.recipes.module import RecipeModule, require_model_option, step_schedule
from pl_normkit.recipes.upsampling.baselines import baselines
from pl_normkit.recipes.upsampling.samples import Batch, Task
from pl_normkit.recipes.upsampling.scores import BORDER, ScoreTable, rmse, wrong_share


class UpsamplingModule(RecipeModule):
    """Train FDKN or DKN: mean absolute error of known pixels, Adam, a learning rate that falls by steps.

    Args:
        task: factor and reduction. From the command line it comes from the data, as do the classes.
        classes: of label maps; 0 for numbers.
        fast: FDKN; else DKN, at full resolution.
        kernel_size: taps a side.
        filter_size: side of the window that taps stay in.
        residual: see `pl_normkit.nn.JointFilter`.
        lr: learning rate.
        decay: factor on the learning rate after each `decay_steps` steps; published are 1e-4, 0.2 and 10,000.
        decay_steps: see decay.
        ema_decay: decay of the moving average of the weights, by which validation and the checkpoint go; 0 switches it off.

    Raises ConfigError for arguments that do not make a network.
    """

    def __init__(
        self,
        task: Task,
        classes: int = 0,
        fast: bool = True,
        kernel_size: int = 3,
        filter_size: int = 15,
        residual: bool = True,
        lr: float = 1e-4,
        decay: float = 0.2,
        decay_steps: int = 10_000,
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__()
        require_model_option(0 <= ema_decay < 1, "ema_decay", ema_decay, "take a decay below 1, such as 0.999; 0 switches it off")
        if decay_steps < 1 or not 0 < decay <= 1:
            evidence = f"decay {decay}, decay_steps {decay_steps}"
            raise ConfigError("the learning rate cannot fall so", where="--model.decay", evidence=evidence, fix="take 0.2 and 10000")
        self.task, self.classes = task, classes
        self.class_names = [f"class {index}" for index in range(classes)] or ["value"]
        self.lr, self.decay, self.decay_steps, self.ema_decay = lr, decay, decay_steps, ema_decay
        self.network = DeformableKernelNetwork(fast, kernel_size, filter_size, residual)
        side = 64
        self.example_input_array = (torch.zeros(2, 3, side, side), torch.zeros(2, max(classes, 1), side, side))
        self.table, self.wrong = ScoreTable(), ScoreTable()

    @property
    def method(self) -> str:
        """The name of the network in tables."""
        return "FDKN" if self.network.fast else "DKN"

    def forward(self, guidance: Tensor, start: Tensor) -> Tensor:
        """Guidance (N, 3, H, W) and enlarged maps (N, C, H, W), both in [0, 1], to sharpened maps (N, C, H, W)."""
        sharpened: Tensor = self.network(guidance, start)
        return sharpened

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        error = self(batch.guidance, batch.start) - (batch.truth - batch.shift) / batch.span
        known = batch.truth.isfinite()
        loss: Tensor = torch.where(known, error, 0.0).abs().sum() / known.sum().clamp_min(1)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.names))
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Maps (N, C, H, W) in units of the data; of label maps the classes (N, 1, H, W)."""
        found: Tensor = self(batch.guidance, batch.start) * batch.span + batch.shift
        return found.argmax(1, keepdim=True) if self.classes else found

    def on_validation_epoch_start(self) -> None:
        self.table, self.wrong = ScoreTable(), ScoreTable()

    def on_test_epoch_start(self) -> None:
        self.table, self.wrong = ScoreTable(), ScoreTable()

    def evaluate(self, batch: Batch, stage: str) -> None:
        found = self(batch.guidance, batch.start) * batch.span + batch.shift
        for index, (name, group) in enumerate(zip(batch.names, batch.groups, strict=True)):
            truth = batch.truth[index]
            if min(truth.shape[-2:]) <= 2 * BORDER:
                evidence = f"{truth.shape[-1]} x {truth.shape[-2]} pixels, of which {BORDER} at each side do not count"
                raise DataError("a map is too small to be judged", where=name, evidence=evidence, fix="take it out of the data set")
            for method, result in {**self._baseline_maps(batch, index), self.method: found[index]}.items():
                self.table.add(method, group, rmse(result.to(truth.device), truth))
                if self.classes:
                    self.wrong.add(method, group, wrong_share(result.to(truth.device), truth))

    def _baseline_maps(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """Of one image, in units of the data, on its device."""
        shift, span = batch.shift[index], batch.span[index]
        scaled = (batch.coarse[index] - shift) / span
        return {method: run(batch.guidance[index], scaled) * span + shift for method, run in baselines().items()}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:  # no score of the training
            self.table, self.wrong = ScoreTable(), ScoreTable()

    def log_scores(self, stage: str) -> None:
        """The mean over images, whatever their group; of the network, and of bicubic interpolation beside it."""
        for method, name in ((self.method, f"{stage}_rmse"), ("bicubic", f"{stage}_rmse_bicubic")):
            scores = [score for found in self.table.values[method].values() for score in found]
            self.log(name, sum(scores) / len(scores) if scores else torch.nan, prog_bar=method == self.method, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.decay_steps, self.decay)
        return step_schedule(optimizer, schedule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["task"] = str(self.task)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises DataError where the checkpoint was trained for another factor or reduction."""
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("task", str(self.task)) != str(self.task):
            raise DataError(
                "the checkpoint was trained for another task than the data sets",
                evidence=f"checkpoint: {checkpoint['task']}; data: {self.task}",
                fix="give --data.factor and --data.reduction as in its training",
            )
