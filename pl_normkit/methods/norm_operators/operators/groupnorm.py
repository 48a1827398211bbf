"""Group norm: torch's module, with as many groups as divide the channels."""

from __future__ import annotations

__all__ = ["OPERATOR"]

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import batch_norms


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    groups = math.gcd(options["groups"], old.width)
    new = nn.GroupNorm(groups, old.width, old.eps, affine=old.weight is not None, device=old.device, dtype=old.dtype)
    if old.weight is not None and old.bias is not None:
        new.weight, new.bias = old.weight, old.bias
    return new


OPERATOR = Operator(
    name="groupnorm",
    formula="gamma (x - mean) / sqrt(var + eps) + beta over a group of channels and all positions of one sample",
    source="Group Normalization, arXiv 1803.08494; torch's module. 32 groups, or the largest common divisor with the channels (derived)",
    replaces="batch norms",
    places=batch_norms,
    make=_make,
    kept="no",
    when="a few samples per device; running statistics go, samples no longer depend on one another",
    options={"groups": 32},
)
