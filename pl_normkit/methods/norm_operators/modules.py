"""Modules that a conversion puts into a model."""

from __future__ import annotations

__all__ = ["CentredOutputs", "CentredOutputsOfConv1D", "CompressedRMSNorm", "Recentre", "RecentreAndDrop", "ShiftedRMSNorm"]

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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


class RecentreAndDrop(nn.Module):
    """Takes the mean over the last dimension away from each row, and leaves its last value out: it is minus the sum of the others.

    >>> RecentreAndDrop()(torch.tensor([[1.0, 3.0]])).tolist()
    [[-1.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., width); shape (..., width - 1)."""
        return x[..., :-1] - x.mean(-1, keepdim=True)


class CompressedRMSNorm(nn.Module):
    """RMS norm of rows with zero mean whose last value is left out (CRMSNorm): x / sqrt((sum of x^2 + (sum of x)^2) / width + eps).

    Args:
        width: channels with the one left out.
        eps: added to the mean square.
        weight: gamma, of `width` values, or None.
        bias: beta, likewise.
        whole: whether the value that is left out comes back in the output, which gamma and beta need.

    >>> CompressedRMSNorm(2, 0.0)(torch.tensor([3.0])).tolist(), CompressedRMSNorm(2, 0.0, whole=True)(torch.tensor([3.0])).tolist()
    ([1.0], [1.0, -1.0])
    """

    is_norm = True  # for `pl_normkit.norm_modules`
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, width: int, eps: float, weight: nn.Parameter | None = None, bias: nn.Parameter | None = None, *, whole: bool = False
    ) -> None:
        super().__init__()
        self.width, self.eps, self.whole = width, eps, whole
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., width - 1); the same shape, or (..., width) where `whole`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        total = wide.sum(-1, keepdim=True)
        scale = torch.rsqrt((wide.square().sum(-1, keepdim=True) + total.square()) / self.width + self.eps)
        y = ((torch.cat([wide, -total], -1) if self.whole else wide) * scale).to(x.dtype)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, whole={self.whole}"


class CentredOutputs(nn.Module):
    """Mixed into a linear layer: it writes rows of zero mean; weight and bias are stored as they are and centred in each forward pass."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., inputs); shape (..., outputs)."""
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return functional.linear(x, self.weight - self.weight.mean(0, keepdim=True), bias)


class CentredOutputsOfConv1D(nn.Module):
    """`CentredOutputs` for GPT-2's Conv1D, which stores (inputs, outputs)."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (..., inputs); shape (..., outputs)."""
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return functional.linear(x, weight.t(), self.bias - self.bias.mean())
