"""Segmentation from boxes: a box classifier, pseudo labels by its attention, and any smp architecture trained on what may be wrong."""

from pl_normkit.recipes.boxes.classifier import BoxClassifierModule as BoxClassifierModule
from pl_normkit.recipes.boxes.data import BoxesData as BoxesData
from pl_normkit.recipes.boxes.data import BoxFolderData as BoxFolderData
from pl_normkit.recipes.boxes.data import COCOBoxData as COCOBoxData
from pl_normkit.recipes.boxes.data import TextureObjects as TextureObjects
from pl_normkit.recipes.boxes.data import VOCBoxData as VOCBoxData
from pl_normkit.recipes.boxes.main import RECIPE as RECIPE
from pl_normkit.recipes.boxes.model import BoxSegmentationModule as BoxSegmentationModule
from pl_normkit.recipes.boxes.model import CosineSegmenter as CosineSegmenter
from pl_normkit.recipes.boxes.notes import BoxNotes as BoxNotes

__all__ = [
    "RECIPE",
    "BoxClassifierModule",
    "BoxFolderData",
    "BoxNotes",
    "BoxSegmentationModule",
    "BoxesData",
    "COCOBoxData",
    "CosineSegmenter",
    "TextureObjects",
    "VOCBoxData",
]
