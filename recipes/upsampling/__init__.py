"""Guided upsampling: depth, disparity or label maps sharpened by an image, against bicubic, guided and joint bilateral filters."""

from pl_normkit.recipes.upsampling.baselines import joint_bilateral as joint_bilateral
from pl_normkit.recipes.upsampling.data import FolderData as FolderData
from pl_normkit.recipes.upsampling.data import MiddleburyData as MiddleburyData
from pl_normkit.recipes.upsampling.data import NYUData as NYUData
from pl_normkit.recipes.upsampling.data import StereoAndPlanes as StereoAndPlanes
from pl_normkit.recipes.upsampling.data import UpsamplingData as UpsamplingData
from pl_normkit.recipes.upsampling.main import RECIPE as RECIPE
from pl_normkit.recipes.upsampling.model import UpsamplingModule as UpsamplingModule
from pl_normkit.recipes.upsampling.writer import MapWriter as MapWriter

__all__ = [
    "RECIPE",
    "FolderData",
    "MapWriter",
    "MiddleburyData",
    "NYUData",
    "StereoAndPlanes",
    "UpsamplingData",
    "UpsamplingModule",
    "joint_bilateral",
]
