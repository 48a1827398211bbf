"""The rules of this room, NK401 to NK411: what the search shows to fail is explained, what only the graph suggests is said as such.

- singular: roots, logarithms, divisions and functions at the border of their domain.
- few: variances and means of too few elements.
- corner_batches: training steps that one day meet such a batch.
- precision: overflow, and epsilons that half precision loses.
"""

from __future__ import annotations

__all__ = ["corner_batches", "few", "precision", "singular"]

from pl_normkit.methods.nan_safety.rules import corner_batches, few, precision, singular
