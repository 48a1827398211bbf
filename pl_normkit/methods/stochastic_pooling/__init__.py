"""Stochastic average pooling: average a random subset of each window while training, all of it in evaluation.

Source: "Stochastic Subsampling With Average Pooling", arXiv 2409.16630. From public summaries of it come the subset, the sqrt
scale and the mask shared over channels; the definition of every form here is derived from them, the full text was not at hand.

    rules.py       NK106
    measure.py     whether a scale keeps the second moment
    fix.py         which pools a model has, and the swap
    modules.py     torch's pools with `keep` and `scale`
    functional.py  the same as functions
    geometry.py    which cells each output averages
    subset.py      random subsets from a seed: what the kernels repeat bit for bit
    reference.py   the eager definition, which also runs on a CPU
    kept_rows.py   small windows of channels-last maps on a CPU
    ops.py         torch operators, their shapes and gradients
    kernels.py     Triton kernels
    launch.py      their block sizes and launches
"""

from __future__ import annotations

__all__ = [
    "PoolRole",
    "SecondMoments",
    "StochasticAdaptiveAvgPool1d",
    "StochasticAdaptiveAvgPool2d",
    "StochasticAvgPool1d",
    "StochasticAvgPool2d",
    "measure_second_moments",
    "pool_roles",
    "stochastic_adaptive_avg_pool",
    "stochastic_avg_pool",
    "stochastic_pooling",
]

from pl_normkit.methods.stochastic_pooling.fix import PoolRole, pool_roles, stochastic_pooling
from pl_normkit.methods.stochastic_pooling.functional import stochastic_adaptive_avg_pool, stochastic_avg_pool
from pl_normkit.methods.stochastic_pooling.measure import SecondMoments, measure_second_moments
from pl_normkit.methods.stochastic_pooling.modules import (
    StochasticAdaptiveAvgPool1d,
    StochasticAdaptiveAvgPool2d,
    StochasticAvgPool1d,
    StochasticAvgPool2d,
)
