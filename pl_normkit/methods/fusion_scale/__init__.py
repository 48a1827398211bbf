"""Scale of what multi-level fusions join: measured, and equalized with fixed statistics.

Source: "Scale Equalization for Multi-Level Feature Fusion", arXiv 2402.01149. Its abstract and a public review were at hand, its
body was not; what is derived here says so.
"""

from __future__ import annotations

__all__ = [
    "BranchScale",
    "FusionScale",
    "MeanPadding",
    "ScaleEqualizer",
    "calibrate_scales",
    "equalize_scales",
    "fold",
    "insert_equalizers",
    "measure_fusion_scales",
]

from pl_normkit.methods.fusion_scale.calibrate import calibrate_scales
from pl_normkit.methods.fusion_scale.fix import equalize_scales, insert_equalizers
from pl_normkit.methods.fusion_scale.fold import fold
from pl_normkit.methods.fusion_scale.measure import BranchScale, FusionScale, measure_fusion_scales
from pl_normkit.methods.fusion_scale.modules import MeanPadding, ScaleEqualizer
