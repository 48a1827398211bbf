"""A LightningModule over any classifier of timm."""

from __future__ import annotations

__all__ = ["ClassAccuracy", "ClassifierModule"]

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from pl_normkit.methods.gaussian_bias import add_gaussian_bias
from pl_normkit.recipes.cosine import cosine_factor
from pl_normkit.recipes.module import RecipeModule, require_model_option, step_schedule
from pl_normkit.recipes.vit.groups import layer_decay_groups
from pl_normkit.recipes.vit.network import build_network

Batch = tuple[Tensor, Tensor]


class ClassAccuracy(MulticlassAccuracy):
    """torchmetrics' accuracy per class, NaN (instead of 0) for a class that does not occur."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none", validate_args=False)

    def compute(self) -> Tensor:
        """Share of each class that is told right, (num_classes,)."""
        accuracy: Tensor = super().compute()
        right, _, _, missed = self._final_state()
        return accuracy.masked_fill((right + missed) == 0, math.nan)


class ClassifierModule(RecipeModule):
    """Train any timm model, ViT or CNN, to classify images.

    Args:
        class_names: one name per class, in the order of the labels. From the command line it comes from the data.
        name: a timm model.
        pretrained: start from timm's weights instead of random ones.
        options: further arguments of `timm.create_model`.
        image_size: side of the images in pixels; from the command line it comes from the data.
        in_chans: channels of the images; from the command line it comes from the data.
        drop_path: largest probability of dropping a residual branch; None is 0.1 where the network has stochastic depth.
        gaussian_bias: add a learnable Gaussian of the patch distance to the attention logits of every layer.
        label_smoothing: share of each target spread over all classes.
        lr: learning rate of the head, and of all layers with `layer_decay` 1.
        weight_decay: of the parameters whose role wants it (`pl_normkit.methods.weight_decay.param_groups`).
        layer_decay: factor on the learning rate from each layer to the one below.
        warmup_epochs: length of the linear warm-up before the cosine; may be a fraction.
        ema_decay: decay of the moving average of the weights, by which validation and the checkpoint go; 0 switches it off.

    Raises ModelSpecError, ConfigError or NothingMatchedError for arguments that do not make a network.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        name: str = "vit_tiny_patch16_224",
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
        image_size: int = 224,
        in_chans: int = 3,
        drop_path: float | None = None,
        gaussian_bias: bool = False,
        label_smoothing: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        warmup_epochs: float = 5,
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__()
        require_model_option(drop_path is None or 0 <= drop_path < 1, "drop_path", drop_path, "take a probability below 1")
        require_model_option(0 <= label_smoothing < 1, "label_smoothing", label_smoothing, "take a share below 1")
        require_model_option(0 < layer_decay <= 1, "layer_decay", layer_decay, "take a factor above 0, at most 1 (1 switches it off)")
        require_model_option(warmup_epochs >= 0, "warmup_epochs", warmup_epochs, "take 0 or more")
        require_model_option(0 <= ema_decay < 1, "ema_decay", ema_decay, "take a decay below 1, such as 0.999; 0 switches it off")
        self.class_names = list(class_names)
        self.pretrained = pretrained
        self.label_smoothing = label_smoothing
        self.lr = lr
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.warmup_epochs = warmup_epochs
        self.ema_decay = ema_decay
        self.network = build_network(
            name,
            len(self.class_names),
            image_size=image_size,
            in_chans=in_chans,
            pretrained=pretrained,
            drop_path=drop_path,
            **(options or {}),
        )
        self.example_input_array: Tensor = torch.zeros(2, in_chans, image_size, image_size)
        if gaussian_bias:
            add_gaussian_bias(self.network, example_inputs=self.example_input_array)
        self.top1 = self._accuracy("micro")
        self.macro = self._accuracy("macro")
        self.of_class = ClassAccuracy(len(self.class_names))
        self.accuracy: dict[str, float] = {}
        self.class_accuracy: dict[str, float] = {}

    def _accuracy(self, average: Literal["micro", "macro"]) -> MulticlassAccuracy:
        return MulticlassAccuracy(len(self.class_names), average=average, validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to logits (N, classes)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy with label smoothing; targets are labels (N,) or, of mixed images, shares (N, classes)."""
        images, targets = batch
        loss = F.cross_entropy(self(images), targets, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: Batch, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(images), sync_dist=True)
        for metric in (self.top1, self.macro, self.of_class):
            metric.update(logits, labels)

    def log_scores(self, stage: str) -> None:
        values = {"acc": self.top1.compute(), "acc_macro": self.macro.compute()}
        self.top1.reset()
        self.macro.reset()
        of_class = self.of_class.compute()
        self.of_class.reset()
        if not self.trainer.sanity_checking:
            self.class_accuracy = dict(zip(self.class_names, of_class.tolist(), strict=True))
            self.accuracy = {name: float(value) for name, value in values.items()}
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, prog_bar=True)

    def score_tables(self) -> Mapping[str, Mapping[str, float]]:
        return {"Accuracy of each class": self.class_accuracy} if self.class_accuracy else {}

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """Probabilities (N, classes)."""
        shares: Tensor = self(batch[0]).float().softmax(-1)
        return shares

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.count_steps()
        groups = layer_decay_groups(self.network, self.lr, self.weight_decay, self.layer_decay, self.example_input_array)
        optimizer = torch.optim.AdamW(groups, self.lr)
        warmup = self._warmup_steps(total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_factor(step, total, warmup))
        return step_schedule(optimizer, schedule)

    def _warmup_steps(self, total: int) -> int:
        """Steps of the warm-up; at most a third of a run that is shorter than planned."""
        batches = self.trainer.num_training_batches
        per_epoch = batches / self.trainer.accumulate_grad_batches if math.isfinite(batches) else total
        return min(round(self.warmup_epochs * per_epoch), total // 3)

    def explain_strange_keys(self, keys: Sequence[str]) -> str:
        return "set --model.gaussian_bias true" if any("gaussian_bias" in key for key in keys) else super().explain_strange_keys(keys)
