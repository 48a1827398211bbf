"""Constant gains taken into the parameters before them."""

from __future__ import annotations

__all__ = ["fold_edits"]

import math

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_placement.modules import ConstantGain
from pl_normkit.surgery import Change, Edit, Remove, get_module
from pl_normkit.values import SetValues


@torch.no_grad()
def fold_edits(model: nn.Module) -> tuple[list[Edit], list[Change]]:
    """New parameters for the modules with a gain, and the gains' removal; what keeps its gain, and why."""
    edits: list[Edit] = []
    kept: list[Change] = []
    for path, gain in model.named_modules():
        if not isinstance(gain, ConstantGain):
            continue
        at, _, name = path.rpartition(".")
        host = get_module(model, at)
        values = _values(host, gain.value) if gain.side == "after" else None
        if values is None:
            kept.append(Change(at, "keeps its gain: it has no scale and shift of its own that take it exactly"))
            continue
        named = {f"{at}.{own}": value for own, value in values.items()}
        edits += [SetValues(at, named, f"times {gain.value:.4g}"), Remove(at, name, "the gain is folded")]
    return edits, kept


def _values(host: nn.Module, gain: float) -> dict[str, Tensor] | None:
    """Weight and bias times the gain; for a norm that scales by 1 + weight, so that this is scaled; None where the output would differ."""
    own = dict(host.named_parameters(recurse=False))
    if not own or not set(own) <= {"weight", "bias"} or "weight" not in own:
        return None
    scaled = {name: parameter * gain for name, parameter in own.items()}
    shifted = {**scaled, "weight": (1 + own["weight"]) * gain - 1}
    return next((values for values in (scaled, shifted) if _is_gained(host, own, values, gain)), None)


def _is_gained(host: nn.Module, own: dict[str, nn.Parameter], values: dict[str, Tensor], gain: float) -> bool:
    """Whether the module's own forward, without its hooks, gives `gain` times its output with these values."""
    weight = own["weight"]
    for shape in _input_shapes(host, weight):
        x = torch.linspace(-4, 4, math.prod(shape), device=weight.device, dtype=weight.dtype).reshape(shape).sin()
        try:
            before = host.forward(x)
            after = torch.func.functional_call(_Bare(host), {f"host.{name}": value for name, value in values.items()}, (x,))
        except (RuntimeError, IndexError, ValueError):
            continue
        allowed = 16 * torch.finfo(weight.dtype).eps * before.abs().max().clamp(min=1)
        return bool((before * gain - after).abs().max() <= allowed)
    return False


def _input_shapes(host: nn.Module, weight: Tensor) -> list[tuple[int, ...]]:
    """Shapes of inputs that may fit: rows and images for a norm, rows for a matrix stored either way, images for a convolution."""
    if weight.dim() == 1:
        return [(3, len(weight)), (3, len(weight), 2, 2)]
    if weight.dim() == 2:
        return [(3, weight.shape[1]), (3, weight.shape[0])]
    return [(3, weight.shape[1] * getattr(host, "groups", 1), *(9 for _ in weight.shape[2:]))]


class _Bare(nn.Module):
    """Calls the forward of a module without its hooks."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.host.forward(x)
        return result
