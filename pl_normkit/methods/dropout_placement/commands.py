"""What this room adds to the command line: `lint --probe variance_shift`."""

from __future__ import annotations

__all__: list[str] = []

from typing import Any

from torch import nn

from pl_normkit.commands import lint_probe
from pl_normkit.methods.dropout_placement.measure import measure_variance_shift


@lint_probe("variance_shift", "Variance that a norm sees, eval over train mode")
def _variance_shift(model: nn.Module, inputs: Any) -> Any:
    return measure_variance_shift(model, inputs)
