"""One import for the modules and functions that people use by hand."""

from __future__ import annotations

__all__ = [
    "BackgroundAwarePool2d",
    "BinaryFocalLoss",
    "BinaryLogLoss",
    "CausalTransformer",
    "CosineClassifier",
    "DeformableKernelNetwork",
    "FiLMNorm",
    "GaussianAttentionBias",
    "JointFilter",
    "NoiseAwareLoss",
    "PositionalTimeEmbedding",
    "PoweredLoss",
    "RMSELoss",
    "SILogLoss",
    "ScaleEqualizer",
    "StochasticAdaptiveAvgPool1d",
    "StochasticAdaptiveAvgPool2d",
    "StochasticAvgPool1d",
    "StochasticAvgPool2d",
    "TimeAfterNorm",
    "VarianceSafeErasing",
    "VarianceSafeMixup",
    "safe_log",
    "safe_power",
    "safe_sqrt",
    "stable_variance",
]

from pl_normkit.methods.box_supervision import BackgroundAwarePool2d, CosineClassifier, NoiseAwareLoss
from pl_normkit.methods.fusion_scale import ScaleEqualizer
from pl_normkit.methods.gaussian_bias import GaussianAttentionBias
from pl_normkit.methods.guided_upsampling import DeformableKernelNetwork, JointFilter
from pl_normkit.methods.nan_safety.modules import BinaryFocalLoss, BinaryLogLoss, PoweredLoss, RMSELoss, SILogLoss
from pl_normkit.methods.nan_safety.ops import safe_log, safe_power, safe_sqrt, stable_variance
from pl_normkit.methods.norm_placement.reference import CausalTransformer
from pl_normkit.methods.positional_variance.modules import VarianceSafeErasing, VarianceSafeMixup
from pl_normkit.methods.stochastic_pooling import (
    StochasticAdaptiveAvgPool1d,
    StochasticAdaptiveAvgPool2d,
    StochasticAvgPool1d,
    StochasticAvgPool2d,
)
from pl_normkit.methods.timestep_embedding.modules import FiLMNorm, PositionalTimeEmbedding, TimeAfterNorm
