"""Steer a loss's arguments by gradient to where one of its operations is singular: the argument of that very log to 0."""

from __future__ import annotations

__all__ = ["Danger", "dangers", "steered"]

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from pl_normkit.graph.autograd import source_line
from pl_normkit.methods.nan_safety.losses.arguments import Arguments, Role
from pl_normkit.methods.nan_safety.losses.loss_call import LossCall

# Operation -> which operand, and the values of it at or beyond which value or gradient is not finite.
SINGULAR: Mapping[str, tuple[int, tuple[float, ...]]] = {
    **dict.fromkeys(("sqrt", "rsqrt", "log", "log2", "log10", "reciprocal", "__rtruediv__", "__rdiv__"), (0, (0.0, -0.1))),
    **dict.fromkeys(("div", "true_divide", "divide", "__truediv__", "__div__"), (1, (0.0,))),
    **dict.fromkeys(("pow", "__pow__", "float_power"), (0, (0.0, -0.1))),
    **dict.fromkeys(("acos", "arccos", "asin", "arcsin", "atanh", "arctanh", "erfinv"), (0, (1.0, 1.1, -1.0, -1.1))),
    **dict.fromkeys(("acosh", "arccosh"), (0, (1.0, 0.9))),
    "logit": (0, (0.0, 1.0)),
    "log1p": (0, (-1.0, -1.1)),
    "xlogy": (1, (0.0, -0.1)),
    **dict.fromkeys(("exp", "expm1", "sinh", "cosh"), (0, (100.0,))),
    "exp2": (0, (200.0,)),
}
STEPS = 5
LARGEST = 6e4  # no argument is moved beyond it


@dataclass(frozen=True)
class Danger:
    """An operation and a value that its operand should not reach."""

    name: str
    source: str
    operand: int
    value: float


class _Operands(TorchFunctionMode):
    """Hands the operands of operations that can be singular to `keep`."""

    def __init__(self, keep: Callable[[str, str, int, Tensor], None]) -> None:
        super().__init__()
        self._keep = keep

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = (resolve_name(func) or "").rsplit(".", 1)[-1].rstrip("_") if not _is_dunder(func) else func.__name__
        if name in SINGULAR:
            operand, _ = SINGULAR[name]
            tensor = args[operand] if operand < len(args) else None
            if isinstance(tensor, Tensor) and _can_be_steered(tensor) and not ("pow" in name and _is_harmless(args[1:2])):
                self._keep(name, source_line(sys._getframe(1)), operand, tensor)
        return func(*args, **(kwargs or {}))


def _can_be_steered(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.is_floating_point() and tensor.numel() > 0


def _is_harmless(exponent: tuple[Any, ...]) -> bool:
    return bool(exponent) and isinstance(exponent[0], (int, float)) and exponent[0] >= 1


def _is_dunder(func: Any) -> bool:
    return str(getattr(func, "__name__", "")).startswith("__")


def dangers(call: LossCall) -> list[Danger]:
    """Each operation of the loss, by source line, that can be steered into a singular value."""
    found: dict[Danger, None] = {}

    def keep(name: str, source: str, operand: int, tensor: Tensor) -> None:
        for value in SINGULAR[name][1]:
            found[Danger(name, source, operand, value)] = None

    with _Operands(keep):
        call.value(call.example)
    return list(found)


def steered(call: LossCall, danger: Danger) -> Iterator[Arguments]:
    """Arguments on the way to `danger`: Newton steps of the operand's nearest element along its gradient."""
    current = call.example
    for _ in range(STEPS):
        moved = _stepped(call, current, danger)
        if moved is None:
            return
        current = moved
        yield current


def _stepped(call: LossCall, current: Arguments, danger: Danger) -> Arguments | None:
    operands: list[Tensor] = []

    def keep(name: str, source: str, operand: int, tensor: Tensor) -> None:
        if (name, source) == (danger.name, danger.source):
            operands.append(tensor)

    with _Operands(keep):
        _, free = call.value(current)
    positions = [p for p, leaf in enumerate(current.leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    leaves = free[: len(positions)]
    if not operands or not leaves:
        return None
    distances = (operands[0].flatten() - danger.value).detach().abs()
    nearest = operands[0].flatten()[int(torch.nan_to_num(distances, nan=math.inf).argmin())]
    gradients = torch.autograd.grad(nearest, leaves, allow_unused=True)
    slopes = {p: g for p, g in zip(positions, gradients, strict=True) if g is not None and current.roles[p] is Role.FREE}
    length = sum(float(slope.double().square().sum()) for slope in slopes.values())
    step = (danger.value - float(nearest.detach())) / length if length else math.inf
    if not math.isfinite(step) or step == 0:
        return None
    moved = {p: _within_bounds(current, p, current.tensor(p).detach() + step * slope) for p, slope in slopes.items()}
    if not all(bool((tensor.detach().abs() <= LARGEST).all()) for tensor in moved.values()):  # also where it is not finite
        return None
    return current.replaced(moved)


def _within_bounds(current: Arguments, position: int, tensor: Tensor) -> Tensor:
    bounds = current.bounds.get(position)
    return (tensor if bounds is None else tensor.clamp(*bounds)).requires_grad_()
