"""Stage one: a classifier of boxes whose pooling leaves out what looks like the background around them."""

from __future__ import annotations

__all__ = ["BoxClassifierModule"]

import math
from collections.abc import Sequence

import lightning as L
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError, ModelSpecError, nearest
from pl_normkit.methods.box_supervision import BackgroundAwarePool2d
from pl_normkit.recipes.boxes.samples import BoxBatch


class BoxClassifierModule(L.LightningModule):
    """Trains features and a classifier without bias on boxes, and on the background that their pooling compares them with.

    Args:
        class_names: background first. From the command line it comes from the data.
        encoder_name: an smp encoder, or "tu-" and a timm model.
        encoder_weights: None starts from random weights; anything else is downloaded by smp.
        depth: stages of the encoder; above 3 it is dilated to keep stride 8.
        channels: of the features.
        side: images are squashed to this square, in pixels.
        steps: training steps.
        batch_size: images in a step.
        lr: learning rate at the start; it falls to 0 by the poly schedule.
        pool: "bap", or "gap" for plain averages of boxes; the labelling compares with the background either way.

    Raises ModelSpecError or ConfigError for arguments that do not make a network.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        encoder_name: str = "resnet18",
        encoder_weights: str | None = None,
        depth: int = 3,
        channels: int = 128,
        side: int = 320,
        steps: int = 2000,
        batch_size: int = 16,
        lr: float = 1e-3,
        pool: str = "bap",
    ) -> None:
        super().__init__()
        self.class_names = list(class_names)
        for name, value in (("steps", steps), ("batch_size", batch_size), ("channels", channels)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1", where=f"--classifier.{name}", evidence=str(value))
        if side < 32 or side % 32:
            fix = "take a multiple of 32"
            raise ConfigError("images cannot be squashed to this", where="--classifier.side", evidence=str(side), fix=fix)
        if pool not in ("bap", "gap"):
            raise ConfigError("there is no such pool", where="--classifier.pool", evidence=repr(pool), fix="take bap or gap")
        self.side, self.steps, self.batch_size, self.lr = side, steps, batch_size, lr
        self.encoder, width = _build_encoder(encoder_name, encoder_weights, depth)
        self.project = nn.Sequential(nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, len(self.class_names), bias=False)
        # A share of background above 1 does not exist: that pool always averages.
        self.pool = BackgroundAwarePool2d(min_background=0.125 if pool == "bap" else 1.0)
        self.attend = BackgroundAwarePool2d(grid=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to features (N, channels, h, w)."""
        features: Tensor = self.project(self.encoder(images)[-1])
        return features

    def on_before_batch_transfer(self, batch: BoxBatch | DataError, dataloader_idx: int) -> BoxBatch:
        """Raise here, in the main process, the DataError that a loader worker handed over as its batch."""
        if isinstance(batch, DataError):
            raise batch
        return batch

    def training_step(self, batch: BoxBatch, batch_idx: int) -> Tensor:
        pooled = self.pool(self(batch.images), batch.boxes, (self.side, self.side))
        labels = torch.cat([labels.to(self.device) for labels in batch.labels])[pooled.region_boxes]
        vectors = torch.cat([pooled.regions, pooled.queries])
        targets = torch.cat([labels, labels.new_zeros(len(pooled.queries))])
        logits = self.classifier(vectors)
        loss: Tensor = F.cross_entropy(logits, targets, reduction="sum") / max(len(targets), 1)
        self.log("classifier_loss", loss, prog_bar=True, batch_size=len(batch.images))
        right = (logits[: len(labels), 1:].argmax(1) + 1 == labels).float()
        if len(right):
            self.log("classifier_acc", right.mean(), prog_bar=True, batch_size=len(batch.images))
        return loss

    def predict_step(self, batch: BoxBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Features (N, channels, h, w) and attention A (N, h, w), by one query an image."""
        features = self(batch.images)
        return features, self.attend(features, batch.boxes, (self.side, self.side)).attention

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.pow(max(1 - step / self.steps, 0.0), 0.9))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _build_encoder(name: str, weights: str | None, depth: int) -> tuple[nn.Module, int]:
    """The encoder and the channels of its last map."""
    where = f"--classifier.encoder_name={name}, depth={depth}"
    if not 3 <= depth <= 5:
        raise ConfigError("the encoder cannot have this depth", where=where, fix="take 3, 4 or 5")
    try:
        encoder = smp.encoders.get_encoder(name, depth=depth, weights=weights, **({"output_stride": 8} if depth > 3 else {}))
    except Warning:
        raise
    except Exception as error:
        fix = nearest(name, smp.encoders.get_encoder_names()) or "take another encoder, or --classifier.depth 3"
        evidence = f"{type(error).__name__}: {error}"
        raise ModelSpecError("segmentation-models-pytorch cannot build the encoder", where=where, evidence=evidence, fix=fix) from error
    return encoder, int(encoder.out_channels[-1])
