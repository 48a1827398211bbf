"""Batch-channel normalization: a batch norm, then a group norm with one scale and shift a group."""

from __future__ import annotations

__all__ = ["OPERATOR", "BatchChannelNorm"]

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import batch_norms


class BatchChannelNorm(nn.Module):
    """The old batch norm, then torch's group norm without parameters, then a scale and a shift for each group."""

    is_norm: ClassVar[bool] = True  # for `pl_normkit.norm_modules`

    def __init__(self, old: OldNorm, groups: int) -> None:
        super().__init__()
        self.batch = old.module
        self.channel = nn.GroupNorm(groups, old.width, old.eps, affine=False)
        self.weight = nn.Parameter(old.ones(groups, 1))
        self.bias = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (batch, channels, ...); the same shape."""
        grouped = self.channel(self.batch(x)).unflatten(1, (self.channel.num_groups, -1)).flatten(3)
        result: Tensor = (grouped * self.weight[..., None] + self.bias[..., None]).reshape(x.shape)
        return result


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return BatchChannelNorm(old, math.gcd(options["groups"], old.width))


OPERATOR = Operator(
    name="bcn",
    formula="gamma_g GN(BN(x)) + beta_g, one gamma and beta for each of 32 groups",
    source=(
        "Rethinking Normalization and Elimination Singularity in Neural Networks, arXiv 1911.09738 (code); its estimate for micro-batches "
        "is not here. Fewer groups where 32 does not divide the channels (derived)"
    ),
    replaces="batch norms",
    places=batch_norms,
    make=_make,
    kept="no",
    when="convolutions with standardized weights, always together: swap `weight_standardized` too",
    options={"groups": 32},
    needs="statistics across ranks as the old batch norm has them: `sync_batchnorm=True` converts its inner batch norm too",
)
