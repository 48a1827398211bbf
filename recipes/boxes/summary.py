"""What a run ends with: IoU per class, findings of all stages, checkpoint, and pictures of labels and predictions."""

from __future__ import annotations

__all__ = ["summarize_boxes"]

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from rich.console import Console

from pl_normkit.recipes.boxes.data import BoxesData
from pl_normkit.recipes.boxes.model import BoxSegmentationModule
from pl_normkit.recipes.boxes.pictures import LabelledImage, draw_labels
from pl_normkit.recipes.image_files import decode_picture
from pl_normkit.recipes.segmentation.samples import CollateNamed, PredictDataset
from pl_normkit.recipes.segmentation.summary import summarize_fit
from pl_normkit.recipes.writing import log_folder

_ROWS = 6


def summarize_boxes(trainer: L.Trainer, module: BoxSegmentationModule, data: BoxesData, console: Console) -> None:
    """Print the result of a fit; rank zero prints and draws, the others do nothing."""
    pictures: Mapping[str, Path] = {}
    if trainer.is_global_zero and data.label_folder is not None:
        sheet = log_folder(trainer) / "labels.png"
        draw_labels(_rows(module, data, data.label_folder), module.class_names, sheet)
        console.print(f"labels:     {sheet}", soft_wrap=True, highlight=False)
        pictures = {"training images: boxes, attention, labels, prediction": sheet}
    summarize_fit(trainer, module, data, console, pictures)


@torch.no_grad()
def _rows(module: BoxSegmentationModule, data: BoxesData, folder: Path) -> list[LabelledImage]:
    rows, source, training = [], data.box_source, module.training
    module.eval()
    dataset = PredictDataset(source)
    for index in range(min(_ROWS, len(source))):
        batch = data.on_before_batch_transfer(CollateNamed()([dataset[index]]), 0)
        image = source.read_image(index)
        labels = module.predict_logits(batch[0].to(module.device)).argmax(1)[0, : image.shape[1], : image.shape[2]].cpu()
        first, second = (decode_picture(folder / kind / f"{source.name(index)}.png", "label map", None) for kind in ("first", "second"))
        path = folder / "attention" / f"{source.name(index)}.png"
        attention = decode_picture(path, "attention", None).float() / 255 if path.is_file() else None
        rows.append(LabelledImage(image, source.read_boxes(index), attention, first, second, labels))
    module.train(training)
    return rows
