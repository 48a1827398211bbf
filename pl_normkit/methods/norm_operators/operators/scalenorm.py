"""ScaleNorm: rows of one learned length."""

from __future__ import annotations

__all__ = ["OPERATOR", "ScaleNorm"]

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm


class ScaleNorm(RowNorm):
    """g * x / max(norm of x, eps), with a scalar g that starts at sqrt(width).

    With `under_root` g * x / sqrt(norm of x ^ 2 + eps), computed in float32 at least: an RMS norm of the same eps divided by the width.
    """

    def __init__(self, old: OldNorm, eps: float = 1e-5, *, under_root: bool = False) -> None:
        super().__init__(replace(old, weight=None, bias=None, eps=eps))
        self.under_root = under_root
        self.g = nn.Parameter(old.ones(1) * math.sqrt(old.width))

    def normalized(self, rows: Tensor) -> Tensor:
        if self.under_root:
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            return (self.g * wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + self.eps)).to(rows.dtype)
        length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return self.g * rows / length.clamp(min=self.eps)


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return ScaleNorm(old, options["eps"])


OPERATOR = Operator(
    name="scalenorm",
    formula="g x / max(||x||, eps), g = sqrt(width) at the start",
    source="Transformers without Tears, arXiv 1910.05895 (code)",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="an RMS norm without scale, up to where eps acts; `to_scalenorm` converts a trained model exactly",
    when="small translation data; its abstract reports that pre-norm itself degrades on large data; gamma and beta go",
    options={"eps": 1e-5},
)
