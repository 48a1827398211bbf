"""Semantic segmentation: any smp architecture on a folder of images and masks, or on built-in texture photographs."""

from pl_normkit.recipes.segmentation.data import FolderData as FolderData
from pl_normkit.recipes.segmentation.data import SegmentationData as SegmentationData
from pl_normkit.recipes.segmentation.data import TextureMosaic as TextureMosaic
from pl_normkit.recipes.segmentation.losses import LOSSES as LOSSES
from pl_normkit.recipes.segmentation.losses import SegmentationLoss as SegmentationLoss
from pl_normkit.recipes.segmentation.main import RECIPE as RECIPE
from pl_normkit.recipes.segmentation.model import ClassIoU as ClassIoU
from pl_normkit.recipes.segmentation.model import SegmentationModule as SegmentationModule
from pl_normkit.recipes.segmentation.model import poly_factor as poly_factor
from pl_normkit.recipes.segmentation.mosaic import TEXTURES as TEXTURES
from pl_normkit.recipes.segmentation.public_data import ADE20KData as ADE20KData
from pl_normkit.recipes.segmentation.public_data import CityscapesData as CityscapesData
from pl_normkit.recipes.segmentation.public_data import STAREData as STAREData
from pl_normkit.recipes.segmentation.public_data import VOCData as VOCData
from pl_normkit.recipes.segmentation.writer import MaskWriter as MaskWriter

__all__ = [
    "LOSSES",
    "RECIPE",
    "TEXTURES",
    "ADE20KData",
    "CityscapesData",
    "ClassIoU",
    "FolderData",
    "MaskWriter",
    "STAREData",
    "SegmentationData",
    "SegmentationLoss",
    "SegmentationModule",
    "TextureMosaic",
    "VOCData",
    "poly_factor",
]
