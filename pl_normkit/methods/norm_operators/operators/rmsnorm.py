"""RMS norm: torch's module, with the old norm's eps in place of torch's default (the dtype's smallest step)."""

from __future__ import annotations

__all__ = ["OPERATOR"]

from collections.abc import Mapping
from typing import Any

from torch import nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    new = nn.RMSNorm(old.width, eps=old.eps, elementwise_affine=old.weight is not None, device=old.device, dtype=old.dtype)
    if old.weight is not None:
        new.weight = old.weight
    return new


OPERATOR = Operator(
    "rmsnorm",
    "gamma * x / sqrt(mean(x^2) + eps)",
    "Root Mean Square Layer Normalization, arXiv 1910.07467; eps under the root as torch has it, the official code adds 1e-8 to the root",
    _make,
    drops=("bias",),
)
