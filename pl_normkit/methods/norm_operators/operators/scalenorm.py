"""ScaleNorm: rows of one learned length."""

from __future__ import annotations

__all__ = ["OPERATOR", "ScaleNorm"]

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator


class ScaleNorm(nn.Module):
    """g * x / max(norm of x, eps), with a scalar g that starts at sqrt(width).

    >>> old = OldNorm(4, 1e-5, None, None, torch.device("cpu"), torch.float32)
    >>> ScaleNorm(old)(torch.tensor([3.0, 0.0, 0.0, 4.0])).tolist()
    [1.2..., 0.0, 0.0, 1.6...]
    """

    def __init__(self, old: OldNorm, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.full((1,), math.sqrt(old.width), device=old.device, dtype=old.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., width); the same shape."""
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return self.g * x / length.clamp(min=self.eps)


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return ScaleNorm(old, options["eps"])


OPERATOR = Operator(
    "scalenorm",
    "g * x / max(||x||, eps), g = sqrt(width) at the start",
    "Transformers without Tears, arXiv 1910.05895 (code)",
    _make,
    {"eps": 1e-5},
    drops=("weight", "bias", "g"),
)
