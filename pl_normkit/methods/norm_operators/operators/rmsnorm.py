"""RMS norm: torch's module, with the old norm's eps in place of torch's default (the dtype's smallest step)."""

from __future__ import annotations

__all__ = ["OPERATOR"]

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms


class ChannelsFirstRMSNorm(nn.RMSNorm):
    """torch's RMS norm over the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (batch, channels, ...); the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    kind = nn.RMSNorm if old.axis == -1 else ChannelsFirstRMSNorm
    new = kind(old.width, eps=old.eps, elementwise_affine=old.weight is not None, device=old.device, dtype=old.dtype)
    if old.weight is not None:
        new.weight = old.weight
    return new


OPERATOR = Operator(
    name="rmsnorm",
    formula="gamma x / sqrt(mean(x^2) + eps)",
    source="Root Mean Square Layer Normalization, arXiv 1910.07467; eps under the root as in torch; the official code adds it to the root",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="not unless rows have zero mean; `to_rmsnorm` converts a trained model exactly",
    when="transformers to be trained from scratch, for a cheaper norm; gamma and eps stay, beta goes",
)
