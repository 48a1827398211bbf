"""What placements put into a model."""

from __future__ import annotations

__all__ = ["ConstantGain", "HandsOn", "HeadGain", "NormBehindAddition", "OutputNorm", "RemembersInput", "ShortcutGain"]

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STREAM = "normkit_stream"


class ConstantGain(nn.Module):
    """Multiplies by a number that does not learn; no keys. `side` says where it stands: "before" or "after" the module that holds it."""

    def __init__(self, value: float, side: str = "after") -> None:
        super().__init__()
        self.value, self.side = value, side

    def extra_repr(self) -> str:
        return f"{self.value:.4g}"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


class OutputNorm(nn.Module):
    """Layer norm or RMS norm over one axis, at the end of a branch or inside it. Its scale starts at 1.

    Args:
        kind: "layer" or "rms".
        width: size of the axis.
        eps: added to the variance or the mean square.
        axis: the axis of the features, -1 for tokens, 1 for images (N, C, H, W).
        bias: also shift; layer norm only.
    """

    sets_own_scale = True
    """For weight decay: decay on the scale of an output norm harms (arXiv 2605.26895, abstract)."""

    def __init__(
        self,
        kind: Literal["layer", "rms"],
        width: int,
        eps: float,
        axis: int = -1,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.width, self.eps, self.axis = kind, width, eps, axis
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        has_bias = bias and kind == "layer"
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if has_bias else None

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.width}, eps={self.eps}, axis={self.axis}"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(self.axis, -1)
        if self.kind == "rms":
            normed = F.rms_norm(rows, (self.width,), self.weight, self.eps)
        else:
            normed = F.layer_norm(rows, (self.width,), self.weight, self.bias, self.eps)
        return normed.movedim(-1, self.axis)


class HeadGain(nn.Module):
    """One learned gain for each head, on the joined heads (..., heads * width) before the output projection. Starts at 1."""

    def __init__(self, heads: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(*x.shape[:-1], len(self.weight), -1) * self.weight[:, None]).flatten(-2)


class RemembersInput(nn.Module):
    """Mix-in for the norm at the entry of a branch: keeps its input, the residual stream, until the branch's end takes it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[_STREAM] = x
        return super().forward(x, *args, **kwargs)


class HandsOn(nn.Module):
    """Mix-in for the norm at the entry of a branch: hands its input on as it is and keeps it, until `NormBehindAddition` takes it."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__[_STREAM] = x
        return x

    def normalize(self, x: Tensor) -> Tensor:
        normed: Tensor = super().forward(x)
        return normed


class _ActsWithNorm(nn.Module):
    """Acts at the end of a branch on its output and on what the norm at its entry has kept. The norm keeps its own place and keys."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["norm"] = norm

    def take_stream(self) -> Tensor:
        stream: Tensor = self.__dict__["norm"].__dict__.pop(_STREAM)
        return stream


class NormBehindAddition(_ActsWithNorm):
    """f becomes norm(x + f) - x, so that the block's own addition of x gives norm(x + f): Post-LN."""

    def forward(self, branch: Tensor) -> Tensor:
        stream = self.take_stream()
        normed: Tensor = self.__dict__["norm"].normalize(stream + branch)
        return normed - stream


class ShortcutGain(_ActsWithNorm):
    """f becomes f + (gain - 1) x, so that the block's own addition of x gives gain x + f: a learned gain per channel on the shortcut."""

    def __init__(
        self, norm: nn.Module, width: int, axis: int = -1, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(norm)
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, branch: Tensor) -> Tensor:
        stream = self.take_stream()
        excess = ((self.weight - 1) * stream.movedim(self.axis, -1)).movedim(-1, self.axis)
        return branch + excess
