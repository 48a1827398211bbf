"""A LightningModule that trains a U-Net to predict noise, and draws samples."""

from __future__ import annotations

__all__ = ["DiffusionModule"]

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pl_normkit.errors import nearest
from pl_normkit.recipes.diffusion.data import DigitImages
from pl_normkit.recipes.diffusion.frechet import FrechetDistance
from pl_normkit.recipes.diffusion.network import Injection, NormName, UNet
from pl_normkit.recipes.diffusion.schedule import NoiseSchedule
from pl_normkit.recipes.diffusion.scorer import FEATURES, Scorer
from pl_normkit.recipes.module import RecipeModule, require_model_option

Batch = tuple[Tensor, Tensor, Tensor]
_LOSS, _SAMPLE = 0, 1


class DiffusionModule(RecipeModule):
    """Denoising diffusion with a small U-Net.

    All noise is drawn on the CPU by numbers: that of a training step by seed, epoch, batch and process, that of a sample by its own
    number. So a resumed run goes on as the whole one would have, and a sample does not depend on batch size or device.

    Args:
        class_names: of the labels that the scoring classifier learns; from the command line they come from the data.
        image_size: side of the images in pixels; from the command line it comes from the data.
        in_chans: channels of the images; from the command line it comes from the data.
        channels: width of the U-Net at full resolution, an even number.
        norm: "group", "batch", "instance" or "layer".
        groups: of the group norms, rounded to a divisor of their channels.
        injection: how the time enters: "add", "positional", "after_norm" or "film".
        steps: times of the noise schedule.
        sample_steps: steps from noise to a sample, at most `steps`.
        lr: learning rate.
        weight_decay: as AdamW takes it.
        ema_decay: decay of the moving average of the weights, by which samples and the checkpoint go; 0 switches it off.

    Raises ConfigError for values that cannot be used.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        image_size: int = 8,
        in_chans: int = 1,
        channels: int = 32,
        norm: NormName = "group",
        groups: int = 8,
        injection: Injection = "add",
        steps: int = 200,
        sample_steps: int = 50,
        lr: float = 2e-3,
        weight_decay: float = 0.0,
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__()
        require_model_option(channels >= 2 and channels % 2 == 0, "channels", channels, "take an even number of 2 or more")
        for option, value, choices in (("norm", norm, get_args(NormName)), ("injection", injection, get_args(Injection))):
            require_model_option(value in choices, option, value, nearest(value, choices) or f"one of {', '.join(choices)}")
        require_model_option(groups >= 1, "groups", groups, "take 1 or more")
        require_model_option(steps >= 1, "steps", steps, "take 1 or more, such as 200")
        require_model_option(1 <= sample_steps <= steps, "sample_steps", sample_steps, f"take 1 to {steps}, or more --model.steps")
        require_model_option(lr > 0, "lr", lr, "take a number above 0")
        require_model_option(0 <= ema_decay < 1, "ema_decay", ema_decay, "take a decay below 1, such as 0.999; 0 switches it off")
        self.class_names = list(class_names)
        self.shape = (in_chans, image_size, image_size)
        self.sample_steps = sample_steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.ema_decay = ema_decay
        self.schedule = NoiseSchedule(steps)
        self.network = UNet(in_chans, channels, norm, groups, injection)
        self.frechet = FrechetDistance(FEATURES)
        self.scores: dict[str, float] = {}
        self.noise_seed: int | None = None
        times = torch.tensor([0, steps - 1])
        self.example_input_array = (_draw((2, *self.shape), 0), times)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """The noise in images (N, in_chans, H, W) at times (N,)."""
        noise: Tensor = self.network(images, times)
        return noise

    def on_fit_start(self) -> None:
        if self.noise_seed is None:
            self.noise_seed = torch.initial_seed()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = batch[0]
        key = (self.noise_seed or 0, self.current_epoch, batch_idx, self.global_rank)
        generator = torch.Generator().manual_seed(_seed(*key))
        times = torch.randint(len(self.schedule.kept), (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        loss = self._loss(images, noise, times)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _loss(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        noise, times = noise.to(images.device), times.to(images.device)
        return F.mse_loss(self._predict(self.schedule.add_noise(images.float(), noise, times), times), noise)

    def _predict(self, images: Tensor, times: Tensor) -> Tensor:
        """In the precision of the weights; back in float32."""
        noise: Tensor = self(images.to(next(self.network.parameters()).dtype), times)
        return noise.float()

    def evaluate(self, batch: Batch, stage: str) -> None:
        """The loss at times that are spread evenly, and one sample for each real image."""
        images, _, numbers = batch
        noise = torch.stack([_draw(self.shape, _LOSS, number) for number in numbers.tolist()])
        times = numbers.cpu() * 7919 % len(self.schedule.kept)
        self.log(f"{stage}_loss", self._loss(images, noise, times), batch_size=len(images), sync_dist=True, prog_bar=True)
        scorer = self._scorer()
        if scorer is not None:
            self.frechet.update(*(scorer.features(found).to(self.device) for found in (images, self.sample(numbers.tolist()))))

    def log_scores(self, stage: str) -> None:
        distance = float(self.frechet.compute())
        self.frechet.reset()
        self.log(f"{stage}_frechet", distance, prog_bar=True, sync_dist=True)  # the sums are synced: alike on every rank
        if not self.trainer.sanity_checking:
            self.scores = {"frechet": distance, "loss": float(self.trainer.callback_metrics[f"{stage}_loss"])}

    def score_tables(self) -> Mapping[str, Mapping[str, float]]:
        """What the distance is measured with."""
        scorer = self._scorer()
        if scorer is None:
            return {}
        rows = {"accuracy of the classifier": scorer.accuracy, "distance of the training images": scorer.floor}
        return {"The distance's classifier, on the validation images": rows}

    def _scorer(self) -> Scorer | None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.scorer if isinstance(data, DigitImages) else None

    @torch.no_grad()
    def sample(self, numbers: Sequence[int]) -> Tensor:
        """Images (N, in_chans, H, W) in [-1, 1]; a number gives the same one each time."""
        draws = torch.stack([_draw((self.sample_steps + 1, *self.shape), _SAMPLE, number) for number in numbers])
        return self.schedule.sample(self._predict, draws.to(self.device))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Samples (N, in_chans, H, W) uint8."""
        return ((self.sample(batch[0].tolist()) + 1) * 127.5).round().to(torch.uint8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["noise_seed"] = self.noise_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.noise_seed = checkpoint.get("noise_seed")


def _seed(*numbers: int) -> int:
    """One seed that is another for other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _draw(shape: Sequence[int], *numbers: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(_seed(*numbers)))
