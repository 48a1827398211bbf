"""How many groups a group norm has: what each count does to the gradient is measured, and batch norms become group norms and back.

Source: "On the Ideal Number of Groups for Isometric Gradient Propagation", arXiv 2302.03193. Its abstract states that the number of groups
influences the gradient; its formula is not known to us. All formulas here are derived by us, and the user chooses the number.

    counts.py   `num_groups`: the divisor nearest to a target
    measure.py  `measure_isometry`: the gradient through each group norm, for every count
    fix.py      `convert_to_group_norm` and `convert_to_batch_norm`
    rules.py    NK811 (preview)
"""

from __future__ import annotations

__all__ = [
    "GroupIsometry",
    "NormIsometry",
    "convert_to_batch_norm",
    "convert_to_group_norm",
    "measure_isometry",
    "num_groups",
]

from pl_normkit.methods.group_count.counts import num_groups
from pl_normkit.methods.group_count.fix import convert_to_batch_norm, convert_to_group_norm
from pl_normkit.methods.group_count.measure import GroupIsometry, NormIsometry, measure_isometry
