"""Time-dependent norm: scale and shift move from one learned vector to another as diffusion time goes on."""

from __future__ import annotations

__all__ = ["OPERATOR", "TimeDependentNorm"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pl_normkit.errors import DataError
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm


class TimeDependentNorm(RowNorm):
    """The old norm with gain p1 + s (p0 - p1), s = sigmoid((1 + slope) t + offset) a channel, and the shift alike.

    p0 are the old norm's parameters under their old keys, p1 a copy of them, so that the function is the old one at the start. `slope`
    and `offset` start at 0, so that weight decay does not move them; the paper's code exempts them from it all the same.
    """

    takes = ("time",)
    other_weight: nn.Parameter | None
    other_bias: nn.Parameter | None

    def __init__(self, old: OldNorm) -> None:
        super().__init__(old)
        self.centred = old.centred
        self.other_weight = None if old.weight is None else nn.Parameter(old.weight.detach().clone())
        self.other_bias = None if old.bias is None else nn.Parameter(old.bias.detach().clone())
        self.slope = nn.Parameter(torch.zeros_like(old.ones()))
        self.offset = nn.Parameter(torch.zeros_like(old.ones()))

    def scaled(self, rows: Tensor) -> Tensor:
        if self.time is None:
            raise DataError("a time-dependent norm was called without a time", fix="call the model inside norm_inputs(model, time=t)")
        if self.time.numel() not in (1, rows.shape[0]):
            raise DataError("a time-dependent norm needs one time a sample", evidence=f"{self.time.numel()} times, {rows.shape[0]} samples")
        time = self.time.reshape(-1, *[1] * (rows.ndim - 1)).to(self.slope.dtype)
        s = torch.sigmoid((1 + self.slope) * time + self.offset)
        normalize = functional.layer_norm if self.centred else functional.rms_norm
        y = normalize(rows, (self.width,), eps=self.eps)
        if self.weight is not None and self.other_weight is not None:
            y = y * (self.other_weight + s * (self.weight - self.other_weight))
        if self.bias is not None and self.other_bias is not None:
            y = y + self.other_bias + s * (self.bias - self.other_bias)
        return y


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return TimeDependentNorm(old)


OPERATOR = Operator(
    name="tdln",
    formula="norm(x) (s p0 + (1 - s) p1), s = sigmoid(w t + c) a channel; the shift alike",
    source="Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models, arXiv 2406.09416 (code)",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="yes: p0 = p1 = the old parameters",
    when="diffusion models, in place of an adaLN MLP in each block; t is a quarter of the log signal-to-noise ratio",
    needs="the time by `norm_inputs`",
)
