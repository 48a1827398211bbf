"""An elementwise stand-in for layer norm: the other channels' part of its statistic becomes one learned number."""

from __future__ import annotations

__all__ = ["OPERATOR", "ElementwiseNorm"]

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm


class ElementwiseNorm(RowNorm):
    """gamma * sqrt(k) * x / sqrt(b + x^2) + beta, with k = width - 1 in place of a layer norm and width in place of an RMS norm.

    A layer norm is exactly sqrt(C - 1) d / sqrt(C s^2 + d^2), where d is the distance to the mean of the other channels and s^2 their
    variance; an RMS norm is sqrt(C) x / sqrt(sum of the other squares + x^2). Here the mean is 0, and b, one learned number, stands for
    the rest. It is held as its logarithm, so that it stays positive.
    """

    def __init__(self, old: OldNorm, variance: float) -> None:
        super().__init__(old)
        if not 0 < variance < math.inf:
            raise ConfigError("variance must be positive", evidence=repr(variance))
        self.factor = math.sqrt(max(old.width - old.centred, 1))
        self.log_b = nn.Parameter(old.ones(1) * math.log(old.width * variance))

    def normalized(self, rows: Tensor) -> Tensor:
        return self.factor * rows * torch.rsqrt(self.log_b.exp() + rows.square())


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return ElementwiseNorm(old, options["variance"])


OPERATOR = Operator(
    name="eln",
    formula="gamma sqrt(k) x / sqrt(b + x^2) + beta, k = C - 1 for a layer norm, C for an RMS norm; b = C variance at the start",
    source="derived here from the definitions of the two norms; arXiv 2503.21708, whose text was not read, is on elementwise norms",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="no",
    when="as dyt; bounded at sqrt(k) in place of 1, so that large features stay large",
    options={"variance": 1.0},
    mark="derived",
)
