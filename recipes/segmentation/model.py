"""A LightningModule over any architecture and encoder of segmentation-models-pytorch."""

from __future__ import annotations

__all__ = ["ClassIoU", "SegmentationModule", "build_network", "poly_factor"]

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from pl_normkit.errors import ModelSpecError, nearest
from pl_normkit.recipes.module import RecipeModule, require_model_option, step_schedule
from pl_normkit.recipes.segmentation.losses import LossName, SegmentationLoss
from pl_normkit.recipes.segmentation.samples import STRIDE
from pl_normkit.recipes.segmentation.tiling import predict_tiled

Batch = tuple[Tensor, Tensor]


def build_network(architecture: str, encoder_name: str, encoder_weights: str | None, num_classes: int, **options: Any) -> nn.Module:
    """Network of segmentation-models-pytorch from images (N, 3, H, W) to logits (N, num_classes, H, W).

    Raises ModelSpecError for an unknown architecture or encoder, weights that cannot be had, or options it does not take.
    """
    known = {name.lower(): name for name in smp.MODEL_ARCHITECTURES_MAPPING}
    where = f"architecture={architecture}, encoder_name={encoder_name}, encoder_weights={encoder_weights}"
    if architecture.lower() not in known:
        hint = nearest(architecture.lower(), known)
        raise ModelSpecError(
            f"segmentation-models-pytorch has no architecture {architecture!r}",
            where=where,
            fix=f"{hint} One of: {', '.join(sorted(known))}".strip(),
        )
    try:
        network: nn.Module = smp.create_model(architecture, encoder_name, encoder_weights, in_channels=3, classes=num_classes, **options)
    except Warning:  # raised where a user makes warnings errors; no reason to call the network impossible
        raise
    except Exception as error:
        raise ModelSpecError(
            f"segmentation-models-pytorch cannot build {architecture} on {encoder_name}",
            where=where,
            evidence=f"{type(error).__name__}: {error}",
            fix=nearest(encoder_name, smp.encoders.get_encoder_names())
            or "check encoder, weights and model_options against smp's documentation",
        ) from error
    return network


def poly_factor(step: int, total_steps: int, power: float = 0.9, warmup_steps: int = 0) -> float:
    """Share of the base learning rate at `step`: (1 - step / total_steps) ** power, after a linear warm-up; 0 from `total_steps` on.

    Source: the "poly" policy of W. Liu et al., ParseNet (2015), as used by the DeepLab papers.
    """
    rise = min((step + 1) / (warmup_steps + 1), 1.0)
    fall = max(1 - step / max(total_steps, 1), 0.0)
    return rise * math.pow(fall, power)


class ClassIoU(MulticlassJaccardIndex):
    """torchmetrics' Jaccard index per class, NaN (instead of 0) for a class found in neither truth nor prediction."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__(num_classes=num_classes, average="none", ignore_index=ignore_index, validate_args=False)

    def compute(self) -> Tensor:
        """IoU per class, (num_classes,)."""
        iou: Tensor = super().compute()
        unseen = (self.confmat.sum(0) + self.confmat.sum(1)) == 0
        return iou.masked_fill(unseen, math.nan)


def _check_tiles(size: int | None, overlap: float) -> None:
    fits = size is None or (size > 0 and size % STRIDE == 0)
    require_model_option(fits, "tile_size", size, f"take a multiple of {STRIDE}")
    require_model_option(0 <= overlap < 1, "tile_overlap", overlap, "take a share such as 0.25")


class SegmentationModule(RecipeModule):
    """Train any smp architecture and encoder for semantic segmentation.

    Args:
        class_names: one name per class, in the order of the mask values. From the command line it comes from the data.
        architecture: name of an smp architecture, such as "Unet" or "DeepLabV3Plus".
        encoder_name: name of an smp encoder, or "tu-" and a timm model.
        encoder_weights: None starts from random weights; anything else is downloaded by smp.
        model_options: further arguments of the smp architecture.
        loss: one of losses.LOSSES, or several joined by "+".
        ignore_index: mask value that counts neither in loss nor in metrics.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        lr: learning rate at the start of the poly schedule.
        weight_decay: as the optimizer takes it.
        poly_power: power of the poly schedule, stepped after every optimizer step.
        warmup_steps: steps of linear warm-up before it.
        ema_decay: decay of the moving average of the weights, by which validation and the checkpoint go; 0 switches it off.
        tile_size: side in pixels of the windows that validation, test and prediction are computed in; None takes images whole.
        tile_overlap: share of a window that it has in common with the next, at least.
        example_size: side in pixels of `example_input_array`, (2, 3, size, size) zeros, by which audits read the network.

    Raises ModelSpecError or ConfigError for arguments that do not make a network.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        architecture: str = "Unet",
        encoder_name: str = "resnet18",
        encoder_weights: str | None = None,
        model_options: dict[str, Any] | None = None,
        loss: LossName = "cross_entropy",
        ignore_index: int = 255,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
        poly_power: float = 0.9,
        warmup_steps: int = 0,
        ema_decay: float = 0.0,
        tile_size: int | None = None,
        tile_overlap: float = 0.25,
        example_size: int = 96,
    ) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.ignore_index = ignore_index
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.poly_power = poly_power
        self.warmup_steps = warmup_steps
        require_model_option(0 <= ema_decay < 1, "ema_decay", ema_decay, "take a decay below 1, such as 0.999; 0 switches it off")
        self.ema_decay = ema_decay
        _check_tiles(tile_size, tile_overlap)
        self.tile_size = tile_size
        self.tile_overlap = tile_overlap
        self.network = self.make_network(architecture, encoder_name, encoder_weights, **(model_options or {}))
        self.loss = SegmentationLoss(loss, ignore_index)
        self.iou = ClassIoU(len(self.class_names), ignore_index)
        self.example_input_array = torch.zeros(2, 3, example_size, example_size)
        self.class_iou: dict[str, float] = {}

    def make_network(self, architecture: str, encoder_name: str, encoder_weights: str | None, **options: Any) -> nn.Module:
        """The network to train, from images to logits. Raises ModelSpecError."""
        return build_network(architecture, encoder_name, encoder_weights, len(self.class_names), **options)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), sides a multiple of 32, to logits (N, classes, H, W)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = batch
        loss: Tensor = self.loss(self(images), masks)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: Batch, stage: str) -> None:
        images, masks = batch
        logits = self.predict_logits(images)
        self.log(f"{stage}_loss", self.loss(logits, masks), batch_size=len(images), sync_dist=True)
        self.iou.update(logits.argmax(1), masks)

    def log_scores(self, stage: str) -> None:
        iou = self.iou.compute()
        self.iou.reset()
        self.class_iou = dict(zip(self.class_names, iou.tolist(), strict=True))
        self.log(f"{stage}_miou", iou.nanmean(), prog_bar=True)
        self.log_dict({f"{stage}_iou/{name}": value for name, value in self.class_iou.items()})

    def score_tables(self) -> Mapping[str, Mapping[str, float]]:
        return {"IoU of each class": self.class_iou} if self.class_iou else {}

    def predict_step(self, batch: tuple[Tensor, list[str], Tensor], batch_idx: int) -> Tensor:
        """Labels (N, H, W), int64, of the padded batch."""
        return self.predict_logits(batch[0]).argmax(1)

    def predict_logits(self, images: Tensor) -> Tensor:
        """As `forward`; large images window by window where `tile_size` is set."""
        if self.tile_size is None:
            logits: Tensor = self(images)
            return logits
        return predict_tiled(self, images, self.tile_size, round(self.tile_size * self.tile_overlap))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.count_steps()
        optimizer = self._build_optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: poly_factor(step, total, self.poly_power, self.warmup_steps))
        return step_schedule(optimizer, schedule)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
