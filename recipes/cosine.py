"""The learning rate of a run, and what decays: shared by recipes that train with AdamW."""

from __future__ import annotations

__all__ = ["cosine_factor", "decay_groups"]

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pl_normkit.errors import NormkitWarning, TraceError
from pl_normkit.methods.weight_decay import param_groups


def cosine_factor(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Share of the base learning rate at `step`: a linear warm-up to 1, then half a cosine to 0 at `total_steps`.

    Source: I. Loshchilov and F. Hutter, SGDR (2017), one cycle; linear warm-up of P. Goyal et al. (2017).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def decay_groups(
    network: nn.Module, weight_decay: float, example_inputs: Any, groups: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """`param_groups`; a network that cannot be traced is warned of, and its roles then come from the types of its modules."""
    try:
        return param_groups(network, weight_decay, example_inputs, groups=groups)
    except TraceError as error:
        text = f"{error.what}; weight decay goes by the types of modules alone"
        warnings.warn(text, NormkitWarning, stacklevel=2)
        return param_groups(network, weight_decay, groups=groups)
