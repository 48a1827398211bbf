"""The effective receptive field: the map of input pixels that drive one unit of a network, and numbers about it.

Sources: `kmbmjn/OpenERF` for backbones; for segmentation networks our own derivation from it (arXiv 2307.14179 introduces
one, whose definition is not known to us).
"""

from __future__ import annotations

__all__ = ["GaussianFit", "ReceptiveField", "compare_receptive_fields", "effective_receptive_field"]

from pl_normkit.receptive_field.field import ReceptiveField
from pl_normkit.receptive_field.gaussian import GaussianFit
from pl_normkit.receptive_field.probe import effective_receptive_field
from pl_normkit.receptive_field.side_by_side import compare_receptive_fields
