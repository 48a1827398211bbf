"""Atrous rates of ASPP that follow the size of the input, since a rate past the feature map reads padding alone.

Source: "Resolution-Aware Design of Atrous Rates for Semantic Segmentation Networks", arXiv 2307.14179. Its abstract states that the
best rates depend on the size of the input image; its formula was not at hand. Every rate and threshold here is derived by us.

    rates.py    the arithmetic: which triple suits a map, what of a kernel a rate leaves alive
    find.py     ASPP by its structure in the graph
    fix.py      `set_atrous_rates`: dilation and padding of the branches
    rules.py    NK501 to NK503
"""

from __future__ import annotations

__all__ = ["Aspp", "AsppBranch", "atrous_rates", "find_aspps", "set_atrous_rates", "valid_tap_share"]

from pl_normkit.methods.atrous_rates.find import Aspp, AsppBranch, find_aspps
from pl_normkit.methods.atrous_rates.fix import set_atrous_rates
from pl_normkit.methods.atrous_rates.rates import atrous_rates, valid_tap_share
