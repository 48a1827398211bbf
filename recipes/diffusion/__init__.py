"""Image generation: a denoising diffusion model on scikit-learn's digits, norm and time injection chosen by flags."""

from pl_normkit.recipes.diffusion.data import DigitImages as DigitImages
from pl_normkit.recipes.diffusion.frechet import FrechetDistance as FrechetDistance
from pl_normkit.recipes.diffusion.frechet import frechet_distance as frechet_distance
from pl_normkit.recipes.diffusion.main import RECIPE as RECIPE
from pl_normkit.recipes.diffusion.model import DiffusionModule as DiffusionModule
from pl_normkit.recipes.diffusion.network import UNet as UNet
from pl_normkit.recipes.diffusion.schedule import NoiseSchedule as NoiseSchedule
from pl_normkit.recipes.diffusion.writer import SampleWriter as SampleWriter

__all__ = ["RECIPE", "DiffusionModule", "DigitImages", "FrechetDistance", "NoiseSchedule", "SampleWriter", "UNet", "frechet_distance"]
