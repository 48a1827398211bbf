"""Training on norms, and what replaces their effect: methods that change which parameters move, how far, or by which gradient.

Sources: LN tuning, arXiv 2312.11420; SAM-ON, arXiv 2306.04226; adaptive gradient clipping, arXiv 2102.06171; LiNeS, arXiv 2410.17146;
normalize and project, arXiv 2407.01800.

    find.py            parameters of norms and of the head, by module type and by the graph
    fix.py             `tune_norms_only`: train norms, freeze all else
    ascent.py          `NormAscent`: sharpness-aware minimization that moves norms only
    clipping.py        `AdaptiveClipping`: gradients clipped by the size of the weights, without the head
    layer_scaling.py   `line_s`: a checkpoint between two, by depth
    rules.py           NK951: norms chosen by name
    projection.py      `WeightProjection`: weights in front of norms keep their length
"""

from __future__ import annotations

__all__ = ["AdaptiveClipping", "NormAscent", "WeightProjection", "line_s", "tune_norms_only"]

from pl_normkit.methods.norm_training.ascent import NormAscent
from pl_normkit.methods.norm_training.clipping import AdaptiveClipping
from pl_normkit.methods.norm_training.fix import tune_norms_only
from pl_normkit.methods.norm_training.layer_scaling import line_s
from pl_normkit.methods.norm_training.projection import WeightProjection
