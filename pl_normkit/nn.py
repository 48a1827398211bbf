"""One import for the modules that people use by hand."""

from __future__ import annotations

__all__ = [
    "StochasticAdaptiveAvgPool1d",
    "StochasticAdaptiveAvgPool2d",
    "StochasticAvgPool1d",
    "StochasticAvgPool2d",
]

from pl_normkit.methods.stochastic_pooling import (
    StochasticAdaptiveAvgPool1d,
    StochasticAdaptiveAvgPool2d,
    StochasticAvgPool1d,
    StochasticAvgPool2d,
)
