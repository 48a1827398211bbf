"""What this room adds to the command line: `lint --probe fusion_scales`."""

from __future__ import annotations

__all__: list[str] = []

from typing import Any

from torch import nn

from pl_normkit.commands import lint_probe
from pl_normkit.methods.fusion_scale.measure import measure_fusion_scales


@lint_probe("fusion_scales", "Largest over smallest standard deviation in a fusion")
def _fusion_scales(model: nn.Module, inputs: Any) -> Any:
    return measure_fusion_scales(model, [inputs], example_inputs=inputs, inputs=lambda batch: batch)
