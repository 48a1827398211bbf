"""What one proof of value is made of, and how it is trained."""

from __future__ import annotations

__all__ = ["SEEDS", "Classifier", "Experiment"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from pl_normkit.recipes.arms import Arm
from pl_normkit.recipes.built_runs import compare_runs
from pl_normkit.recipes.comparison_report import Comparison
from pl_normkit.recipes.trial import Probe

SEEDS = tuple(range(100, 108))
"""Settings were looked for with seeds below 100; these were never used for that."""


@dataclass(frozen=True)
class Experiment:
    """One remedy in one setting.

    Attributes:
        name: of its CSV.
        remedy: what is tried, and `page` where it is explained.
        question: what the runs are to tell, in one sentence.
        setting: data, network, optimizer.
        make_module, make_data, arms, epochs, probes: of `compare_runs`; every seed draws its own split of the data.
        metrics: the first was named beforehand to decide.
        contrasts: the pairs (arm, against) that the page shows.
        limits: what the result does not say.
    """

    name: str
    remedy: str
    page: str
    question: str
    setting: str
    make_module: Callable[..., L.LightningModule]
    make_data: Callable[..., L.LightningDataModule]
    arms: Mapping[str, Arm]
    contrasts: Sequence[tuple[str, str]]
    epochs: int
    limits: str = ""
    metrics: Sequence[str] = ("val_loss", "val_acc")
    probes: Mapping[str, Probe] = field(default_factory=dict)
    seeds: Sequence[int] = SEEDS

    def run(self, seeds: Sequence[int]) -> Comparison:
        """Train every arm with every seed."""
        trainer = {"max_epochs": self.epochs, "check_val_every_n_epoch": self.epochs, "accelerator": "cpu"}
        metric = [*self.metrics, *self.probes]
        return compare_runs(
            self.make_module, self.make_data, self.arms, seeds, metric=metric, trainer=trainer, probes=self.probes, split_per_seed=True
        )


class Classifier(L.LightningModule):
    """Cross-entropy over the last axis but those of an image, SGD with momentum or AdamW, cosine to zero.

    Args:
        net: the network.
        lr, weight_decay, optimizer: "sgd" or "adamw".
        transform: of the normalized training images.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float,
        weight_decay: float = 5e-4,
        optimizer: str = "sgd",
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay, self.optimizer, self.transform = net, lr, weight_decay, optimizer, transform

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        images, labels = batch
        if self.transform is not None:
            images = self.transform(images)
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels))
        self.log("val_acc", 100 * (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
