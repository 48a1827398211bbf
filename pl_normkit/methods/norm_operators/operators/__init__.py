"""Norms that can stand in for others, one file each; a file is found without registration.

A file holds `OPERATOR = Operator(...)` and, where neither torch nor timm has it, one module class; its formula, source and defaults stand
there.
"""

from __future__ import annotations

__all__ = ["OldNorm", "Operator", "Place", "operators"]

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pl_normkit.graph import ModelGraph


@dataclass(frozen=True)
class OldNorm:
    """What is replaced: number of channels, eps, parameters (None where it has none), device, dtype, and the module itself.

    `axis` is the dimension of the channels, -1 or 1; `centred` says whether the mean is taken away.
    """

    width: int
    eps: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    device: torch.device
    dtype: torch.dtype
    axis: Literal[-1, 1]
    centred: bool
    module: nn.Module

    def ones(self, *shape: int) -> torch.Tensor:
        """Of the old norm's dtype, on its device; as many as channels by default."""
        return torch.ones(shape or (self.width,), device=self.device, dtype=self.dtype)


class Place(NamedTuple):
    """A module that an operator could replace; `reason` says why it must not, "" where it may; `goes` are paths that become identities."""

    path: str
    reason: str = ""
    goes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operator:
    """One norm.

    Attributes:
        name: what `swap_norms(model, to=...)` calls it.
        formula: in plain text.
        source: paper, and what was read of it.
        replaces: what it stands in for, in words.
        places: where in a model that is; the graph is None unless `reads_graph`.
        make: a new module for an old one and the options; it takes over the old parameters where it has their like.
        kept: what of the function is kept at the start.
        when: when to try it, and what to mind.
        options: names of its options with their defaults.
        needs: what it needs beside x: a mask, statistics across ranks, a schedule.
        mark: whether formula and defaults stand in the source or are derived here.
        reads_graph: whether `places` needs the traced model.
    """

    name: str
    formula: str
    source: str
    replaces: str
    places: Callable[[nn.Module, ModelGraph | None], Iterator[Place]]
    make: Callable[[OldNorm, Mapping[str, Any]], nn.Module]
    kept: str
    when: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    mark: Literal["published", "derived"] = "published"
    reads_graph: bool = False


@cache
def operators() -> dict[str, Operator]:
    """Every operator by name.

    >>> sorted(operators())[:3]
    ['bcn', 'dyt', 'eln']
    """
    found = [importlib.import_module(f"{__name__}.{file.name}").OPERATOR for file in pkgutil.iter_modules(__path__)]
    return {operator.name: operator for operator in found}
