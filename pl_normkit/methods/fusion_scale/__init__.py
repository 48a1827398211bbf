"""Scale of what multi-level fusions join: measured, and equalized with fixed statistics.

Source: "Scale Equalization for Multi-Level Feature Fusion", arXiv 2402.01149. Its abstract and a public review were at hand, its
body was not; what is derived here says so.

    rules.py             NK301
    find.py              where an equalizer can stand, and what it folds into
    joins.py             which fusions join features of several levels, and what each of their branches is
    measure.py           mean and standard deviation of every branch over the data
    fix.py               `equalize_scales`
    commands.py          `lint --probe fusion_scales`
    stages.py            the same in the two stages of a training run
    calibrate.py         statistics in execution order, with the earlier equalizers active
    fold.py              equalizers into the convolutions that read them
    absorbing_layers.py  what can take an equalizer's statistics over
    moments.py           streaming mean and variance, the same on every rank
    running.py           a model over a loader, everything restored
    modules.py           `ScaleEqualizer`
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
