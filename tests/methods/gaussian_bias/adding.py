"""The bias added as a user would, with the inputs that a family needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pl_normkit.methods.gaussian_bias import add_gaussian_bias
from tests.methods.gaussian_bias.families import OWN


def add(model: nn.Module, images: Tensor, name: str = "", **options: Any) -> Any:
    """With values that change the output, and a trace where the model needs one."""
    inputs = images if name in OWN else None
    return add_gaussian_bias(model, **{"amplitude": 2.0, "sigma": 1.5, "example_inputs": inputs, **options})
