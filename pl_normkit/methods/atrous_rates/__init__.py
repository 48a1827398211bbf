"""Atrous rates of ASPP that follow the size of the input.

Source: "Resolution-Aware Design of Atrous Rates for Semantic Segmentation Networks", arXiv 2307.14179. Its abstract states that the
best rates depend on the size of the input image; its formula was not at hand. Every rate and threshold here is derived by us.
"""

from __future__ import annotations

__all__ = [
    "Aspp",
    "AsppBranch",
    "atrous_rates",
    "edits_for",
    "find_aspps",
    "fit_atrous_rates",
    "output_stride",
    "set_atrous_rates",
    "valid_tap_share",
]

from pl_normkit.methods.atrous_rates.find import Aspp, AsppBranch, find_aspps
from pl_normkit.methods.atrous_rates.fix import edits_for, fit_atrous_rates, set_atrous_rates
from pl_normkit.methods.atrous_rates.rates import atrous_rates, output_stride, valid_tap_share
