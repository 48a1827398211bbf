"""Progressive re-parameterized batch norm: a layer norm that turns into a batch norm while it trains."""

from __future__ import annotations

__all__ = ["OPERATOR", "ProgressiveBatchNorm"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm, mean_over_tokens

MOMENTUM = 0.1


class ProgressiveBatchNorm(RowNorm):
    """In training share * LN(x) + (1 - share) * RepBN(x); in evaluation RepBN(x) alone, which is what is exported.

    RepBN(x) = BN(x) + eta * x over the channels of all tokens, with a gain and a shift of its own; LN is the old norm. The buffer `share`
    starts at 1, and nothing but a schedule (`NormSchedule`) brings it to 0.
    """

    takes = ("mask",)

    def __init__(self, old: OldNorm, eta: float) -> None:
        super().__init__(old)
        self.centred = old.centred
        self.eta = nn.Parameter(old.ones(1) * eta)
        self.batch_weight = nn.Parameter(old.ones())
        self.batch_bias = nn.Parameter(torch.zeros_like(old.ones()))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.share: Tensor
        self.register_buffer("running_mean", torch.zeros_like(old.ones()))
        self.register_buffer("running_var", old.ones())
        self.register_buffer("share", old.ones(1).squeeze(0))

    def scaled(self, rows: Tensor) -> Tensor:
        if not self.training:
            return self._rep_batch_norm(rows, self.running_mean, self.running_var)
        mean, count = mean_over_tokens(rows, self.mask)
        var, _ = mean_over_tokens((rows - mean).square(), self.mask)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), MOMENTUM)
        return self.share * self._old(rows) + (1 - self.share) * self._rep_batch_norm(rows, mean, var)

    def _rep_batch_norm(self, rows: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (rows - mean) * torch.rsqrt(var + self.eps) * self.batch_weight + self.batch_bias + self.eta * rows

    def _old(self, rows: Tensor) -> Tensor:
        if self.centred:
            return functional.layer_norm(rows, (self.width,), self.weight, self.bias, self.eps)
        y = functional.rms_norm(rows, (self.width,), self.weight, self.eps)
        return y if self.bias is None else y + self.bias


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return ProgressiveBatchNorm(old, options["eta"])


OPERATOR = Operator(
    name="prepbn",
    formula="share LN(x) + (1 - share) (BN(x) + eta x); BN(x) + eta x in evaluation",
    source="SLAB, arXiv 2405.11582 (code)",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="in training mode while share is 1; evaluation computes the batch norm from the start",
    when="vision transformers whose norms shall fold into the next layer after training",
    options={"eta": 1.0},
    needs="a schedule (`NormSchedule`); padding mask by `norm_inputs`; statistics are those of all ranks",
)
