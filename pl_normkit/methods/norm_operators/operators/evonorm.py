"""EvoNorm: timm's modules, which stand for a batch norm and the activation behind it."""

from __future__ import annotations

__all__ = ["OPERATOR"]

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from pl_normkit.errors import ConfigError
from pl_normkit.graph import ModelGraph
from pl_normkit.importing import import_library
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator, Place
from pl_normkit.methods.norm_operators.places import why_no_batch_norm

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Hardswish)
_NO_ACTIVATION = "no activation that is a module of its own follows it in an nn.Sequential"
_KINDS = {"s0": "EvoNorm2dS0", "b0": "EvoNorm2dB0"}


def _places(model: nn.Module, graph: ModelGraph | None) -> Iterator[Place]:
    """Batch norms with their activation: timm's BatchNormAct2d, and pairs of neighbours in an nn.Sequential."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    followed: dict[str, str] = {}
    for path, module in model.named_modules():
        if type(module).forward is nn.Sequential.forward:
            names = [f"{path}.{name}" if path else name for name in module._modules]
            followed |= dict(pairwise(names))
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if type(module).__name__ == "BatchNormAct2d" and type(module).__module__ == "timm.layers.norm_act":
            drops = not isinstance(module.drop, nn.Identity)
            yield Place(path, "it drops too" if drops else "" if isinstance(module.act, _ACTIVATIONS) else "it applies no activation")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            act = modules.get(followed.get(path, ""))
            reason = why_no_batch_norm(module, path) or ("" if isinstance(module, nn.BatchNorm2d) else "it normalizes no images")
            if not isinstance(act, _ACTIVATIONS) or uses[id(act)] > 1:
                reason = reason or _NO_ACTIVATION
            yield Place(path, reason, (followed[path],) if not reason else ())


def _make(old: OldNorm, options: Mapping[str, Any]) -> Any:
    if options["kind"] not in _KINDS:
        raise ConfigError(f"there is no EvoNorm {options['kind']!r}", fix=f"one of {', '.join(_KINDS)}")
    layers = import_library("timm.layers", "timm")
    common = {"device": old.device, "dtype": old.dtype}
    if options["kind"] == "s0":
        new: Any = layers.EvoNorm2dS0(old.width, groups=math.gcd(options["groups"], old.width), **common)
    else:
        new = layers.EvoNorm2dB0(old.width, **common)
    if old.weight is not None:
        new.weight, new.bias = old.weight, old.bias
    return new


OPERATOR = Operator(
    name="evonorm",
    formula="s0: gamma x sigmoid(v x) / std of the group + beta; b0: gamma x / max(std of the batch, v x + std of the instance) + beta",
    source="Evolving Normalization-Activation Layers, arXiv 2004.02967; timm's modules and defaults",
    replaces="batch norms with the activation behind them",
    places=_places,
    make=_make,
    kept="no",
    when="s0 for a few samples per device; maps of more than one position",
    options={"kind": "s0", "groups": 32},
    needs="timm; statistics of b0 are those of each rank alone",
)
