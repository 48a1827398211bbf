"""Stage three: any smp architecture with a cosine classifier, trained on two label maps that may be wrong."""

from __future__ import annotations

__all__ = ["BoxSegmentationModule", "CosineSegmenter"]

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from pl_normkit.errors import ConfigError
from pl_normkit.methods.box_supervision import CosineClassifier, NoiseAwareLoss
from pl_normkit.recipes.boxes.samples import VOID, part_labels
from pl_normkit.recipes.segmentation.losses import CrossEntropy
from pl_normkit.recipes.segmentation.model import Batch, SegmentationModule, build_network


class CosineSegmenter(nn.Module):
    """An smp network whose "classes" are features, and cosines between them and a direction a class, times `tau`.

    Args:
        architecture: name of an smp architecture.
        encoder_name: name of an smp encoder.
        encoder_weights: see smp.
        classes: number of classes.
        embedding: number of features.
        tau: temperature.
        options: further arguments of the architecture.
    """

    def __init__(
        self,
        architecture: str,
        encoder_name: str,
        encoder_weights: str | None,
        classes: int,
        *,
        embedding: int = 32,
        tau: float = 20.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.features = build_network(architecture, encoder_name, encoder_weights, embedding, **options)
        self.classifier = CosineClassifier(embedding, classes)
        self.tau = tau

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes, H, W) between -tau and tau."""
        logits: Tensor = self.tau * self.classifier(self.features(images))
        return logits


class BoxSegmentationModule(SegmentationModule):
    """Train any smp architecture on pseudo labels, with the noise-aware loss or cross-entropy on the first map alone.

    Args:
        class_names: background first. From the command line it comes from the data.
        noise: "aware" for NoiseAwareLoss; "ignored" for cross-entropy on the first label map.
        tau: temperature of the cosines.
        gamma: see NoiseAwareLoss.
        lam: see NoiseAwareLoss.
        detach_weight: see NoiseAwareLoss.
        embedding: features before the cosine classifier.
        options: see SegmentationModule; its loss is that of validation, cross-entropy.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        noise: Literal["aware", "ignored"] = "aware",
        tau: float = 20.0,
        gamma: float = 7.0,
        lam: float = 0.1,
        detach_weight: bool = False,
        embedding: int = 32,
        **options: Any,
    ) -> None:
        if embedding < 1 or tau <= 0:
            raise ConfigError("the classifier cannot be built", where="--model.embedding and --model.tau", evidence=f"{embedding}, {tau}")
        self.embedding, self.tau = embedding, tau  # `make_network` needs them
        super().__init__(class_names, loss="cross_entropy", **options)
        self.noise = noise
        self.noise_aware = NoiseAwareLoss(tau, gamma, lam, detach_weight=detach_weight)
        self.plain = CrossEntropy(VOID)

    def make_network(self, architecture: str, encoder_name: str, encoder_weights: str | None, **options: Any) -> nn.Module:
        count = len(self.class_names)
        return CosineSegmenter(architecture, encoder_name, encoder_weights, count, embedding=self.embedding, tau=self.tau, **options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, joined = batch
        first, second = part_labels(joined)
        logits = self(images).float()
        loss: Tensor = self.noise_aware(logits / self.tau, first, second) if self.noise == "aware" else self.plain(logits, first)
        self.log("train_loss", loss, prog_bar=True)
        return loss
