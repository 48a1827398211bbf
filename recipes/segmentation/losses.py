"""Segmentation losses with an ignore index, by name."""

from __future__ import annotations

__all__ = ["LOSSES", "LossName", "SegmentationLoss"]

from typing import Literal, get_args

import segmentation_models_pytorch as smp
import torch.nn.functional as F
from torch import Tensor, nn

LossName = Literal["cross_entropy", "dice", "focal", "lovasz", "cross_entropy+dice", "cross_entropy+lovasz", "focal+dice"]
LOSSES: tuple[str, ...] = get_args(LossName)


class CrossEntropy(nn.Module):
    """Cross-entropy, averaged over the pixels that count; 0 where none does (torch's own mean gives NaN there)."""

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        total = F.cross_entropy(logits, masks, ignore_index=self.ignore_index, reduction="sum")
        return total / (masks != self.ignore_index).sum().clamp(min=1)


class SmpLoss(nn.Module):
    """A loss of smp; 0 where no pixel counts (focal and Lovász give NaN or raise there)."""

    def __init__(self, loss: nn.Module, ignore_index: int) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        if bool((masks == self.ignore_index).all()):
            return logits.sum() * 0
        value: Tensor = self.loss(logits, masks)
        return value


def _build_term(name: str, ignore_index: int) -> nn.Module:
    if name == "cross_entropy":
        return CrossEntropy(ignore_index)
    kinds = {"dice": smp.losses.DiceLoss, "focal": smp.losses.FocalLoss, "lovasz": smp.losses.LovaszLoss}
    return SmpLoss(kinds[name]("multiclass", ignore_index=ignore_index), ignore_index)


class SegmentationLoss(nn.Module):
    """Sum of the losses joined by "+" in `name`: logits (N, C, H, W) and masks (N, H, W) int64 to a scalar."""

    def __init__(self, name: LossName, ignore_index: int) -> None:
        super().__init__()
        self.terms = nn.ModuleList(_build_term(part, ignore_index) for part in name.split("+"))

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits = logits.float()  # under mixed precision too: sums over pixels outgrow 16 bits
        terms: list[Tensor] = [term(logits, masks) for term in self.terms]
        return sum(terms[1:], start=terms[0])
