"""Stochastic average pooling: average a random subset of each window while training, all of it in evaluation.

Source: "Stochastic Subsampling With Average Pooling", arXiv 2409.16630. From public summaries of it come the subset, the sqrt
scale and the mask shared over channels; the definition of every form here is derived from them, the full text was not at hand.
"""

from __future__ import annotations

__all__ = [
    "Role",
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

from pl_normkit.methods.stochastic_pooling.fix import Role, pool_roles, stochastic_pooling
from pl_normkit.methods.stochastic_pooling.functional import stochastic_adaptive_avg_pool, stochastic_avg_pool
from pl_normkit.methods.stochastic_pooling.measure import SecondMoments, measure_second_moments
from pl_normkit.methods.stochastic_pooling.modules import (
    StochasticAdaptiveAvgPool1d,
    StochasticAdaptiveAvgPool2d,
    StochasticAvgPool1d,
    StochasticAvgPool2d,
)
