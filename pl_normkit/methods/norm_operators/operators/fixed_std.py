"""A layer norm whose standard deviation becomes a constant: the step towards a network without norms."""

from __future__ import annotations

__all__ = ["OPERATOR", "FixedStdNorm"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm, mean_over_tokens

MOMENTUM = 0.9


class FixedStdNorm(RowNorm):
    """The old norm while the buffer `share` is 1, gamma * (x - mean(x)) / std + beta with a constant std from when it is 0.

    `std` follows the mean over tokens of sqrt(var + eps) while training and share is 1, and stands still from then on.
    """

    takes = ("mask",)

    def __init__(self, old: OldNorm) -> None:
        super().__init__(old)
        self.centred = old.centred
        self.std: Tensor
        self.share: Tensor
        self.register_buffer("std", torch.zeros_like(old.ones(1)))
        self.register_buffer("share", old.ones(1).squeeze(0))

    def normalized(self, rows: Tensor) -> Tensor:
        rows = rows - rows.mean(-1, keepdim=True) if self.centred else rows
        own = (rows.square().mean(-1, keepdim=True) + self.eps).sqrt()
        is_live = self.share > 0
        if self.training:
            with torch.no_grad():
                now = mean_over_tokens(own, self.mask)[0].to(self.std.dtype)
                moved = torch.where(self.std == 0, now, self.std.lerp(now, 1 - MOMENTUM))
                self.std.copy_(torch.where(is_live, moved, self.std))
        return rows / torch.where(is_live | (self.std == 0), own, self.std)


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return FixedStdNorm(old)


OPERATOR = Operator(
    name="fixed_std",
    formula="gamma (x - mean(x)) / std + beta, std the layer norm's own until a switch, then a constant",
    source="You can remove GPT2's LayerNorm by fine-tuning, arXiv 2409.13710 (code); one constant for all tokens is our reading",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="until its switch; each switch changes the function, so switch one norm after another and train on between",
    when="fine-tuning towards a network without norms; look at the 99.9th percentile of the loss, not at its mean alone",
    needs="a schedule (`NormSchedule`); padding mask by `norm_inputs`; statistics are those of all ranks",
)
