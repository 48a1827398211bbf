"""Augmentation and resampling must not change how much the positional embedding of a vision transformer weighs.

Source: "Configuring Data Augmentations to Reduce Variance Shift in Positional Embedding of Vision Transformers", arXiv 2405.14115. What is
marked published comes from public reviews of it, the full text was not at hand; formulas, thresholds and corrections are derived here.

    rules.py          NK701 to NK705: augmentation and resampling
    scaling_rules.py  NK706: images normalised twice, not at all, or in the wrong order
    find.py           where a model adds its positions to patch tokens
    measure.py        the probe
    pairing.py        which training batches are compared with which evaluation batches
    moments.py        streaming sums of tokens and images
    pipelines/        reads the transforms of timm, torchvision and albumentations
    suggestion.py     a configuration that leaves the balance alone
    fix.py            a resampled embedding gets its variance back
    modules.py        mixup and erasing that keep the variance
    commands.py       `lint --loaders`
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
