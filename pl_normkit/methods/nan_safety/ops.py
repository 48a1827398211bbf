"""Square root, power, logarithm and variance that stay finite, value and gradient, where the plain forms do not. All derived here."""

from __future__ import annotations

__all__ = ["at_least_float32", "safe_log", "safe_power", "safe_sqrt", "stable_variance"]

import math

import torch
from torch import Tensor

# Below these arguments the square root is continued by a straight line. Float16 stops early because its gradient,
# 1 / sqrt(eps), must stay under 65504.
SQRT_EPS = {torch.float16: 1e-8, torch.bfloat16: 1e-12, torch.float32: 1e-12, torch.float64: 1e-24}


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 where it came in half precision, else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def safe_sqrt(x: Tensor, eps: float | None = None) -> Tensor:
    """Square root with a finite gradient everywhere.

    `sqrt(x)` for x > eps, the straight line `x / sqrt(eps)` on [0, eps], 0 below 0: continuous, and within `sqrt(eps) / 4` of
    the square root. The gradient is at most `1 / sqrt(eps)`. Infinity and NaN pass through.

    Args:
        x: any shape, floating; half precision is computed in float32 and returned in its own dtype.
        eps: where the line takes over; default 1e-12 (1e-8 in float16, 1e-24 in float64).

    Source: derived here; the usual fix "sqrt(D + eps)" moves every value, this one moves none above eps.
    """
    bound = SQRT_EPS[x.dtype] if eps is None else eps
    if not bound > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    wide = at_least_float32(x)
    below = wide <= bound
    root = torch.where(below, bound, wide).sqrt()
    line = torch.where(below, wide, 0.0).clamp_min(0.0) / math.sqrt(bound)
    return torch.where(below, line, root).to(x.dtype)


def safe_power(x: Tensor, exponent: float, eps: float = 1e-12) -> Tensor:
    """`x ** exponent` for an exponent in (0, 1], continued below `eps` by a straight line to 0, and 0 below 0: its gradient is finite.

    Args:
        x: any shape, floating; half precision is computed and returned in float32.
        exponent: in (0, 1].
        eps: smallest argument that is taken as it is.

    Source: derived here.
    """
    if not 0 < exponent <= 1 or not eps > 0:
        raise ValueError(f"exponent must lie in (0, 1] and eps be positive, got {exponent} and {eps}")
    wide = at_least_float32(x)
    below = wide <= eps
    line = torch.where(below, wide, 0.0).clamp_min(0.0) * eps ** (exponent - 1)
    return torch.where(below, line, torch.where(below, eps, wide) ** exponent)


def safe_log(x: Tensor, eps: float) -> Tensor:
    """Natural logarithm, continued below `eps` by its tangent, so that the gradient is at most `1 / eps` and never dies.

    Args:
        x: any shape, floating; half precision is computed and returned in float32.
        eps: smallest argument that is taken as it is.

    Source: derived here.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    wide = at_least_float32(x)
    below = wide <= eps
    tangent = math.log(eps) + (torch.where(below, wide, eps) - eps) / eps
    return torch.where(below, tangent, torch.where(below, eps, wide).log())


def stable_variance(x: Tensor, mask: Tensor | None = None, *, correction: int = 0) -> Tensor:
    """Variance over the elements where `mask` is true; 0 where there are too few of them.

    Two passes, no boolean indexing (the shapes stay static, so it compiles), and no element outside the mask is ever read
    into the result or its gradient, whatever it holds.

    Args:
        x: any shape, floating; half precision is computed and returned in float32.
        mask: boolean, broadcastable to x; None takes all elements.
        correction: 0 divides by N (the default here), 1 by N - 1 (torch's default). With N <= correction the result is 0.

    Returns:
        A scalar.

    Source: the biased default is that of `kmbmjn/MDE_Toolbox_Others` (published: repository); the empty case is derived here.
    """
    wide = at_least_float32(x)
    valid = torch.ones_like(wide, dtype=torch.bool) if mask is None else mask.expand_as(wide)
    return masked_moments(wide, valid, correction)[1]


def masked_moments(x: Tensor, valid: Tensor, correction: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance of `x` where `valid`; both 0, with zero gradients, where there is nothing to average."""
    kept = torch.where(valid, x, 0.0)
    count = valid.sum().to(x.dtype)
    mean = kept.sum() / count.clamp_min(1)
    centred = torch.where(valid, kept - mean, 0.0)
    return mean, centred.square().sum() / (count - correction).clamp_min(1)
