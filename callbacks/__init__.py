"""Lightning callbacks: thin adapters, one class per file. Each calls a plain function of `pl_normkit` at the right hook."""

from __future__ import annotations

__all__ = [
    "AdaptiveGradientClipping",
    "AtrousRates",
    "DepthProfile",
    "DropoutPlacement",
    "GammaDecay",
    "GaussianBias",
    "GradientHealth",
    "GroupCount",
    "ModelAudit",
    "NaNGuard",
    "NormPlacement",
    "NormSchedule",
    "NormalizeAndProject",
    "PositionalVariance",
    "RecalibrateBatchNorm",
    "SAMOnNorms",
    "ScaleEqualization",
    "StochasticPooling",
    "SwapNorms",
    "TimestepEmbedding",
]

from pl_normkit.callbacks.adaptive_gradient_clipping import AdaptiveGradientClipping
from pl_normkit.callbacks.atrous_rates import AtrousRates
from pl_normkit.callbacks.depth_profile import DepthProfile
from pl_normkit.callbacks.dropout_placement import DropoutPlacement
from pl_normkit.callbacks.gamma_decay import GammaDecay
from pl_normkit.callbacks.gaussian_bias import GaussianBias
from pl_normkit.callbacks.gradient_health import GradientHealth
from pl_normkit.callbacks.group_count import GroupCount
from pl_normkit.callbacks.model_audit import ModelAudit
from pl_normkit.callbacks.nan_guard import NaNGuard
from pl_normkit.callbacks.norm_placement import NormPlacement
from pl_normkit.callbacks.norm_schedule import NormSchedule
from pl_normkit.callbacks.normalize_and_project import NormalizeAndProject
from pl_normkit.callbacks.positional_variance import PositionalVariance
from pl_normkit.callbacks.recalibrate_batch_norm import RecalibrateBatchNorm
from pl_normkit.callbacks.sam_on_norms import SAMOnNorms
from pl_normkit.callbacks.scale_equalization import ScaleEqualization
from pl_normkit.callbacks.stochastic_pooling import StochasticPooling
from pl_normkit.callbacks.swap_norms import SwapNorms
from pl_normkit.callbacks.timestep_embedding import TimestepEmbedding
