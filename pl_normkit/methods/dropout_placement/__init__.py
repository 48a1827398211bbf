"""Where dropout may stand in a residual branch and in a head with batch norm.

Source: "How to Use Dropout Correctly on Residual Networks with Batch Normalization", arXiv 2302.06112. Its abstract
states the two placements; the graph criteria here are derived from them.
"""

from __future__ import annotations

__all__ = ["measure_variance_shift", "place_dropout"]

from pl_normkit.methods.dropout_placement.fix import place_dropout
from pl_normkit.methods.dropout_placement.measure import measure_variance_shift
