"""Modules that a conversion puts into a model."""

from __future__ import annotations

__all__ = ["Recentre", "ShiftedRMSNorm"]

from typing import Any

import torch
from torch import Tensor, nn


class ShiftedRMSNorm(nn.RMSNorm):
    """RMS norm with the parameters of a layer norm: gamma * x / rms(x) + beta over the last dimension, eps under the root.

    Args:
        width: channels, the size of the last dimension.
        eps: added to the mean square.

    >>> norm = ShiftedRMSNorm(2, eps=0.0)
    >>> norm(torch.tensor([3.0, -3.0])).tolist(), sorted(norm.state_dict())
    ([1.0, -1.0], ['bias', 'weight'])
    """

    def __init__(self, width: int, eps: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(width, eps=eps, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., width); the same shape."""
        return super().forward(x) + self.bias


class Recentre(nn.Module):
    """Takes the mean over the last dimension away from each row.

    >>> Recentre()(torch.tensor([[1.0, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., width); the same shape."""
        return x - x.mean(-1, keepdim=True)
