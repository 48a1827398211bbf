"""What this room adds to the command line: `lint --probe time_awareness`."""

from __future__ import annotations

__all__: list[str] = []

from typing import Any

from torch import nn

from pl_normkit.commands import lint_probe
from pl_normkit.methods.timestep_embedding.measure import measure_time_awareness


@lint_probe("time_awareness", "Time behind the norms")
def _time_awareness(model: nn.Module, inputs: Any) -> Any:
    """At two times that the whole batch shares, small enough for a table of times."""
    return measure_time_awareness(model, inputs, (1, 20))
