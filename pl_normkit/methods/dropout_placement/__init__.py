"""Where dropout may stand in a residual branch and in a head with batch norm.

Source: "How to Use Dropout Correctly on Residual Networks with Batch Normalization", arXiv 2302.06112. Its abstract
states the two placements; the graph criteria here are derived from them.

    rules.py    NK101 to NK105
    find.py     the slots of a branch and the heads, and what each dropout's place is worth
    measure.py  what dropout does to the variance that a norm sees, and the strength of one before a pool
    fix.py      moves dropouts
    commands.py `lint --probe variance_shift`
"""

from __future__ import annotations

__all__ = ["measure_variance_shift", "place_dropout"]

from pl_normkit.methods.dropout_placement.fix import place_dropout
from pl_normkit.methods.dropout_placement.measure import measure_variance_shift
