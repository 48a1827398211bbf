"""Group norm: torch's module, with as many groups as divide the channels."""

from __future__ import annotations

__all__ = ["OPERATOR"]

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pl_normkit.graph import ModelGraph
from pl_normkit.importing import import_library
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator, Place
from pl_normkit.methods.norm_operators.places import batch_norms, is_with_activation, why_hooked


def _places(model: nn.Module, graph: ModelGraph | None) -> Iterator[Place]:
    for place in batch_norms(model, graph):
        module = model.get_submodule(place.path)
        yield Place(place.path, why_hooked(module, place.path)) if is_with_activation(module) else place


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    groups = math.gcd(options["groups"], old.width)
    if is_with_activation(old.module):
        return _with_activation(old, groups)
    new = nn.GroupNorm(groups, old.width, old.eps, affine=old.weight is not None, device=old.device, dtype=old.dtype)
    if old.weight is not None and old.bias is not None:
        new.weight, new.bias = old.weight, old.bias
    return new


def _with_activation(old: OldNorm, groups: int) -> nn.Module:
    """Timm's group norm with the dropout and the activation of its batch norm."""
    has_scale, common = old.weight is not None, {"device": old.device, "dtype": old.dtype}
    new: Any = import_library("timm.layers", "timm").GroupNormAct(old.width, groups, old.eps, affine=has_scale, **common)
    if has_scale:
        new.weight, new.bias = old.weight, old.bias
    new.drop, new.act = old.module.drop, old.module.act
    module: nn.Module = new
    return module


OPERATOR = Operator(
    name="groupnorm",
    formula="gamma (x - mean) / sqrt(var + eps) + beta over a group of channels and all positions of one sample",
    source="Group Normalization, arXiv 1803.08494; torch's module. 32 groups, or the largest common divisor with the channels (derived)",
    replaces="batch norms",
    places=_places,
    make=_make,
    kept="no",
    when="a few samples per device; running statistics go, samples no longer depend on one another",
    options={"groups": 32},
)
