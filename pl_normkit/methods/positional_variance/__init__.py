"""Augmentation and resampling must not change how much the positional embedding of a vision transformer weighs.

Source: "Configuring Data Augmentations to Reduce Variance Shift in Positional Embedding of Vision Transformers", arXiv 2405.14115. What is
marked published comes from public reviews of it, the full text was not at hand; formulas, thresholds and corrections are derived here.
"""

from __future__ import annotations

__all__ = [
    "ImageMoments",
    "SplitVariance",
    "Suggestion",
    "VarianceReport",
    "VarianceSafeErasing",
    "VarianceSafeMixup",
    "measure_positional_variance",
    "rescale_positional_embedding",
    "suggest_augmentation",
]

from pl_normkit.methods.positional_variance.fix import rescale_positional_embedding
from pl_normkit.methods.positional_variance.measure import SplitVariance, VarianceReport, measure_positional_variance
from pl_normkit.methods.positional_variance.modules import VarianceSafeErasing, VarianceSafeMixup
from pl_normkit.methods.positional_variance.moments import ImageMoments
from pl_normkit.methods.positional_variance.suggestion import Suggestion, suggest_augmentation
