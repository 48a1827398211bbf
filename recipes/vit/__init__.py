"""Image classification: any timm ViT or CNN on a folder of images, a torchvision data set, or scikit-learn's digits."""

from pl_normkit.recipes.cosine import cosine_factor as cosine_factor
from pl_normkit.recipes.vit.data import ClassificationData as ClassificationData
from pl_normkit.recipes.vit.digits import Digits as Digits
from pl_normkit.recipes.vit.folder import FolderData as FolderData
from pl_normkit.recipes.vit.groups import layer_decay_groups as layer_decay_groups
from pl_normkit.recipes.vit.main import RECIPE as RECIPE
from pl_normkit.recipes.vit.model import ClassifierModule as ClassifierModule
from pl_normkit.recipes.vit.torchvision_sets import TORCHVISION_SETS as TORCHVISION_SETS
from pl_normkit.recipes.vit.torchvision_sets import TorchvisionData as TorchvisionData
from pl_normkit.recipes.vit.writer import PredictionWriter as PredictionWriter

__all__ = [
    "RECIPE",
    "TORCHVISION_SETS",
    "ClassificationData",
    "ClassifierModule",
    "Digits",
    "FolderData",
    "PredictionWriter",
    "TorchvisionData",
    "cosine_factor",
    "layer_decay_groups",
]
