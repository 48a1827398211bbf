"""Dynamic tanh: no statistics at all; one learned slope a layer."""

from __future__ import annotations

__all__ = ["OPERATOR", "DynamicTanh"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm

LANGUAGE_ALPHA = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}
"""Width of a language model -> alpha at the start in front of attention, and elsewhere (arXiv 2503.10622, tables 11 and 12)."""


class DynamicTanh(RowNorm):
    """gamma * tanh(alpha * x) + beta, with a scalar alpha and the old norm's gamma and beta."""

    def __init__(self, old: OldNorm, alpha: float) -> None:
        super().__init__(old)
        self.alpha = nn.Parameter(old.ones(1) * alpha)

    def normalized(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.alpha * rows)


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return DynamicTanh(old, options["alpha"])


OPERATOR = Operator(
    name="dyt",
    formula="gamma tanh(alpha x) + beta",
    source="Transformers without Normalization, arXiv 2503.10622 (code): alpha 0.5 but for language models, where tables 11, 12 say it",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="no",
    when="transformers and ConvNeXt from scratch with the hyper-parameters of layer norm; watch the share of saturated values",
    options={"alpha": 0.5},
)
