"""Stage two: two label maps and a confidence for each training image, written as PNGs."""

from __future__ import annotations

__all__ = ["LabelScores", "LabelWriter", "box_labels", "label_image"]

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pl_normkit.methods.box_supervision import box_unaries, retrieved_labels
from pl_normkit.recipes.boxes.annotations import Boxes
from pl_normkit.recipes.boxes.classifier import BoxClassifierModule
from pl_normkit.recipes.boxes.refine import Refinement, refine
from pl_normkit.recipes.boxes.samples import VOID, BoxBatch, BoxSource
from pl_normkit.recipes.segmentation.model import ClassIoU
from pl_normkit.recipes.segmentation.pictures import save_palette_mask
from pl_normkit.recipes.writing import PredictionsWriter


class Labels(NamedTuple):
    """Label maps (H, W): refined scores, and retrieval; the confidence of the first, in [0, 1]."""

    first: Tensor
    second: Tensor
    confidence: Tensor


def box_labels(found: Boxes, size: tuple[int, int]) -> Tensor:
    """Boxes filled with their classes (H, W), small ones above large ones: what a box says at the least."""
    filled = torch.zeros(size, dtype=torch.int64)
    areas = (found.boxes[:, 2] - found.boxes[:, 0]) * (found.boxes[:, 3] - found.boxes[:, 1])
    for index in areas.argsort(descending=True).tolist():
        left, top, right, bottom = found.boxes[index].round().int().tolist()
        filled[top:bottom, left:right] = found.labels[index]
    return filled


def label_image(
    image: Tensor, features: Tensor, attention: Tensor, weight: Tensor, found: Boxes, *, refinement: Refinement, threshold: float
) -> Labels:
    """The label maps of one image.

    Args:
        image: (3, H, W) uint8.
        features: (C, h, w) of the classifier.
        attention: (h, w), A by one query.
        weight: (classes, C) of the classifier.
        found: boxes in pixels of the image.
        refinement: see `refine`.
        threshold: see `box_unaries`.
    """
    size = (image.shape[-2], image.shape[-1])
    scores = box_unaries(features, weight, attention, found.boxes, found.labels, size, threshold=threshold)
    refined = refine(image, scores, refinement)
    allowed = _allowed(found, len(weight), size)
    refined = torch.where(allowed, refined, 0.0)
    first = refined.argmax(0)
    confidence = refined.amax(0) / refined.sum(0).clamp_min(1e-8)
    boxes = torch.cat([found.boxes, found.labels[:, None].float()], 1)
    return Labels(first, retrieved_labels(features, first, weight, boxes), confidence)


def _allowed(found: Boxes, classes: int, size: tuple[int, int]) -> Tensor:
    """Where a class may be (classes, H, W): in its boxes; the background everywhere."""
    allowed = torch.zeros(classes, *size, dtype=torch.bool)
    allowed[0] = True
    for (left, top, right, bottom), label in zip(found.boxes.round().int().tolist(), found.labels.tolist(), strict=True):
        allowed[label, top:bottom, left:right] = True
    return allowed


class LabelScores:
    """IoU of label maps with the masks, where there are masks."""

    def __init__(self, classes: int) -> None:
        self.iou = {name: ClassIoU(classes, VOID) for name in ("boxes filled", "first (refined)", "second (retrieval)")}
        self.differing, self.counted, self.has_masks = 0, 0, False

    def update(self, labels: Labels, filled: Tensor, mask: Tensor) -> None:
        """Add an image."""
        self.has_masks = self.has_masks or bool((mask != VOID).any())
        for iou, found in zip(self.iou.values(), (filled, labels.first, labels.second), strict=True):
            iou.update(found[None], mask[None])
        self.differing += int((labels.first != labels.second).sum())
        self.counted += labels.first.numel()

    def means(self) -> dict[str, float]:
        """MIoU by kind of labels; empty without masks."""
        return {name: float(iou.compute().nanmean()) for name, iou in self.iou.items()} if self.has_masks else {}

    def print(self, console: Console) -> None:
        """The means as a table, and how far the two maps differ."""
        console.print(f"labels:     the two maps differ in {self.differing / max(self.counted, 1):.1%} of the pixels", highlight=False)
        if not self.has_masks:
            console.print("            there are no masks to score them by", highlight=False)
            return
        table = Table()
        table.add_column("labels of the training images")
        table.add_column("mIoU", justify="right")
        for name, value in self.means().items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)


class LabelWriter(PredictionsWriter):
    """Writes `first`, `second`, `confidence` and `attention` of each image, under its name, at its size.

    Args:
        source: of the images that are labelled.
        folder: for the PNGs.
        refinement: see `refine`.
        threshold: see `box_unaries`.
    """

    def __init__(self, source: BoxSource, folder: Path, refinement: Refinement, threshold: float) -> None:
        super().__init__()
        self.source, self.folder, self.refinement, self.threshold = source, folder, refinement, threshold
        self.scores: LabelScores | None = None

    def write(self, trainer: L.Trainer, module: L.LightningModule, prediction: Any, batch: BoxBatch) -> None:
        assert isinstance(module, BoxClassifierModule)
        weight = module.classifier.weight.detach().float().cpu()
        self.scores = self.scores or LabelScores(len(weight))
        for index, features, attention in zip(batch.indices.tolist(), *(part.float().cpu() for part in prediction), strict=True):
            image, mask = self.source.read(index)
            found, name = self.source.read_boxes(index), self.source.name(index)
            labels = label_image(image, features, attention, weight, found, refinement=self.refinement, threshold=self.threshold)
            self.scores.update(labels, box_labels(found, (image.shape[-2], image.shape[-1])), mask)
            save_palette_mask(labels.first, self.folder / "first" / f"{name}.png", len(weight))
            save_palette_mask(labels.second, self.folder / "second" / f"{name}.png", len(weight))
            _save_share(labels.confidence, self.folder / "confidence" / f"{name}.png")
            _save_share(attention, self.folder / "attention" / f"{name}.png")


def _save_share(values: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values.clamp(0, 1) * 255).round().byte().numpy()).save(path)
