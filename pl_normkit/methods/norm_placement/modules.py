"""What placements put into a model."""

from __future__ import annotations

__all__ = [
    "ConstantGain",
    "HandsOn",
    "HeadGain",
    "HeadNorm",
    "NormAheadOfBranch",
    "NormBehindAddition",
    "NormOnShortcut",
    "OutputNorm",
    "PassesOn",
    "RemembersBoth",
    "RemembersInput",
    "RemembersOutput",
    "ShortcutGain",
]

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import EditError

_STREAM = "normkit_stream"
_MADE = "normkit_made"


class _Kept:
    """A tensor of the forward pass that is running, which copies and pickles of its module do not take along."""

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


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
    """Layer norm or RMS norm over one axis, at the end of a branch or inside it.

    Args:
        kind: "layer" or "rms".
        width: size of the axis.
        eps: added to the variance or the mean square.
        axis: the axis of the features, -1 for tokens, 1 for images (N, C, H, W).
        bias: also shift; layer norm only.
        scale: where its scale starts.
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
        scale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.width, self.eps, self.axis = kind, width, eps, axis
        self.weight = nn.Parameter(torch.full((width,), scale, device=device, dtype=dtype))
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


class HeadNorm(nn.Module):
    """RMS norm of each head of queries, keys or values (..., heads * width), with one scale for all heads. Starts at 1."""

    sets_own_scale = True

    def __init__(self, width: int, eps: float, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.reshape(*x.shape[:-1], -1, self.width), (self.width,), self.weight, self.eps).flatten(-2)


class RemembersInput(nn.Module):
    """Mix-in for the norm at the entry of a branch: keeps its input, the residual stream, until the branch's end takes it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[_STREAM] = _Kept(x)
        return super().forward(x, *args, **kwargs)


class RemembersOutput(nn.Module):
    """Mix-in for a dropout between a norm and the stream: keeps its output until the end of the branch takes it."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x)
        self.__dict__[_MADE] = _Kept(found)
        return found


class RemembersBoth(nn.Module):
    """Mix-in for a norm: keeps its input and its output until the end of the branch takes them."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x)
        self.__dict__[_STREAM], self.__dict__[_MADE] = _Kept(x), _Kept(found)
        return found


class PassesOn(nn.Module):
    """Mix-in for a norm that has no place any more: hands its input on as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class HandsOn(nn.Module):
    """Mix-in for the norm at the entry of a branch: hands its input on as it is and keeps it, until `NormBehindAddition` takes it."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__[_STREAM] = _Kept(x)
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
        stream: Tensor = self.__dict__["norm"].__dict__.pop(_STREAM).value
        return stream


class NormBehindAddition(_ActsWithNorm):
    """f becomes norm(x + f) - x, so that the block's own addition of x gives norm(x + f): Post-LN."""

    def forward(self, branch: Tensor) -> Tensor:
        stream = self.take_stream()
        normed: Tensor = self.__dict__["norm"].normalize(stream + branch)
        return normed - stream


class NormOnShortcut(_ActsWithNorm):
    """f becomes f + norm(x) - x, so that the block's own addition of x gives norm(x) + f(norm(x)): HybridNorm's feed-forward."""

    def forward(self, branch: Tensor) -> Tensor:
        normed: Tensor = self.__dict__["norm"].__dict__.pop(_MADE).value
        return branch + (normed - self.take_stream())


class NormAheadOfBranch(_ActsWithNorm):
    """f(norm(s)) becomes f(norm(s)) + s - norm(s), so that the addition to norm(s) gives s + f(norm(s)): Pre-LN in a post-norm block.

    `norm` is the one behind the addition before, and `dropout` what stands between it and this block. Both run outside the block, whose
    forward a checkpoint may run again, so in training what they keep stays until the next forward pass.
    """

    def __init__(self, norm: nn.Module, dropout: nn.Module | None) -> None:
        super().__init__(norm)
        self.__dict__["made_by"] = norm if dropout is None else dropout

    def forward(self, branch: Tensor) -> Tensor:
        stream, made = self._take(self.__dict__["norm"], _STREAM), self._take(self.__dict__["made_by"], _MADE)
        if stream.requires_grad and not torch.is_grad_enabled():
            raise EditError(
                "a checkpoint with use_reentrant=True cannot hold a block that was turned to pre-norm",
                fix="checkpoint with use_reentrant=False",
            )
        return (stream + branch) - made  # the sum in front is what the residual stream is, for who reads the graph

    def _take(self, module: nn.Module, name: str) -> Tensor:
        kept = module.__dict__[name] if self.training else module.__dict__.pop(name)
        value: Tensor = kept.value
        return value


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
