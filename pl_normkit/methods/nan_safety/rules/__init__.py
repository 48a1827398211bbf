"""The rules of this room, NK401 to NK410: what the search shows to fail is explained, what only the graph suggests is said as such.

- singular: roots, logarithms, divisions and functions at the border of their domain.
- few: variances and means of too few elements.
- precision: overflow, and epsilons that half precision loses.
"""

from __future__ import annotations

__all__ = ["few", "precision", "singular"]

from pl_normkit.methods.nan_safety.rules import few, precision, singular
