"""Norms that can stand in for a layer norm or an RMS norm over the last dimension, one file each; a file is found without registration.

A file holds one module class and `OPERATOR = Operator(...)`; its formula, source and defaults stand there.
"""

from __future__ import annotations

__all__ = ["OldNorm", "Operator", "operators"]

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OldNorm:
    """The norm that is replaced: `width` of the last dimension, eps, its parameters (None where it has none), device and dtype."""

    width: int
    eps: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Operator:
    """One norm.

    Attributes:
        name: what `swap_norms(model, to=...)` calls it.
        formula: in plain text.
        source: paper, and what was read of it.
        make: a new module for an old norm and the options; it takes over the old parameters where it has their like.
        options: names of its options with their defaults.
        drops: state_dict keys that may go or come.
        mark: whether formula and defaults stand in the source or are derived here.
    """

    name: str
    formula: str
    source: str
    make: Callable[[OldNorm, Mapping[str, Any]], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    mark: Literal["published", "derived"] = "published"


@cache
def operators() -> dict[str, Operator]:
    """Every operator by name.

    >>> sorted(operators())
    ['dyt', 'rmsnorm', 'scalenorm']
    """
    found = [importlib.import_module(f"{__name__}.{file.name}").OPERATOR for file in pkgutil.iter_modules(__path__)]
    return {operator.name: operator for operator in found}
