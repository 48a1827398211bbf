"""Dynamic tanh: no statistics at all; one learned slope a layer."""

from __future__ import annotations

__all__ = ["OPERATOR", "DynamicTanh"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator


class DynamicTanh(nn.Module):
    """gamma * tanh(alpha * x) + beta, with a scalar alpha and the old norm's gamma and beta.

    >>> old = OldNorm(2, 1e-5, None, None, torch.device("cpu"), torch.float32)
    >>> DynamicTanh(old, 0.5)(torch.tensor([0.0, 100.0])).tolist()
    [0.0, 1.0]
    """

    def __init__(self, old: OldNorm, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=old.device, dtype=old.dtype))
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_parameter("weight", old.weight)
        self.register_parameter("bias", old.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., width); the same shape."""
        y = torch.tanh(self.alpha * x)
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return DynamicTanh(old, options["alpha"])


OPERATOR = Operator(
    "dyt",
    "gamma * tanh(alpha * x) + beta",
    "Transformers without Normalization, arXiv 2503.10622 (code): alpha 0.5 outside language models; for those, tables 11 and 12 by width",
    _make,
    {"alpha": 0.5},
    drops=("alpha",),
)
