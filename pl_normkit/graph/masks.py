"""Random masks: constants, draws and comparisons that make one, and the products that are therefore a dropout written out."""

from __future__ import annotations

__all__ = ["MASKING", "Draw", "Mask", "draw_of", "is_drawn_around_zero", "mask_on"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class Mask:
    """A dropout written out: its drop probability, and whether it drops whole channels."""

    p: float
    by_channel: bool


@dataclass(frozen=True)
class Draw:
    """What a value that depends on no input is.

    Attributes:
        kind: a constant, uniform numbers from [value, value + 1), or zeros with probability `value` and one other number.
        value: the constant, the lower bound, or the probability of a zero.
        shape: its shape.
    """

    kind: Literal["constant", "uniform", "mask"]
    value: float
    shape: tuple[int, ...]


_FILLED = {"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0, "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0}
_UNFILLED = frozenset(("empty", "empty_like", "new_empty", "empty_permuted", "empty_strided"))
_KEEPS = """
    to _to_copy type_as float half bfloat16 expand expand_as view reshape unsqueeze squeeze contiguous clone alias detach repeat
    lift_fresh_copy broadcast_tensors getitem"""
_KEEPING = frozenset(_KEEPS.split())
_OF_LISTS = ("tensors", "0")
"""The arguments of `broadcast_tensors` and of `getitem` on what it gives."""

MASKING = {"mul": "", "masked_fill": "mask", "where": "condition"}
"""Operations that may apply a mask, and by which argument (any of a product's)."""


def draw_of(name: str, target: torch.fx.Node, operands: Mapping[str, Draw], shape: tuple[int, ...]) -> Draw | None:
    """What a call makes of `operands`, by argument; None where that is not known. `name` keeps the mark of in-place operations."""
    op = name.rstrip("_")
    made = _source(name, op, target, operands, shape)
    first = next((operands[argument] for argument in ("self", *_OF_LISTS) if argument in operands), None)
    if made is not None or first is None:
        first = operands.get("input")
        return _dropped(target, first, shape) if op == "dropout" and first is not None else made
    if op in _KEEPING:
        return replace(first, shape=shape)
    scalar = _number(target, 1)
    if first.kind == "mask":
        inverts = op in ("logical_not", "bitwise_not") or (op == "rsub" and scalar == 1)
        if inverts:
            return replace(first, value=1 - first.value)
        return replace(first, shape=shape) if op in ("mul", "div") and scalar else None
    if first.kind == "uniform":
        return _compared(op, first, scalar)
    return None


def _source(name: str, op: str, target: torch.fx.Node, operands: Mapping[str, Draw], shape: tuple[int, ...]) -> Draw | None:
    if op in _FILLED:
        return Draw("constant", _FILLED[op], shape)
    if op in _UNFILLED:
        return Draw("constant", math.nan, shape)
    if op in ("full", "full_like", "new_full", "fill"):
        value = _number(target, 2 if op == "new_full" else 1)
        return Draw("constant", value, shape) if value is not None else None
    if op in ("rand", "rand_like") or name == "uniform_":
        is_unit = name != "uniform_" or (_number(target, 1) in (None, 0.0) and _number(target, 2) in (None, 1.0))
        return Draw("uniform", 0.0, shape) if is_unit else None
    if op == "bernoulli":
        before = operands.get("self")
        keep = _number(target, 1)
        if keep is None and len(target.args) > 1:  # probabilities as a tensor
            before, keep = operands.get("p"), None
        if keep is None and before is not None and before.kind == "constant":
            keep = before.value if name == "bernoulli" or "p" in operands else 0.5
        return Draw("mask", 1 - keep, shape) if keep is not None and 0 <= keep <= 1 else None
    return None


def _dropped(target: torch.fx.Node, ones: Draw, shape: tuple[int, ...]) -> Draw | None:
    """`dropout(torch.ones(...))` is a mask."""
    p, is_on = _number(target, 1), bool(target.args[2]) if len(target.args) > 2 else True
    is_filled = ones.kind == "constant" and ones.value not in (0.0,) and not math.isnan(ones.value)
    return Draw("mask", (p or 0.0) if is_on else 0.0, shape) if is_filled else None


def _compared(op: str, uniform: Draw, scalar: float | None) -> Draw | None:
    if op == "floor":
        return replace(uniform, kind="mask", value=1 - uniform.value) if 0 <= uniform.value <= 1 else None
    if scalar is None:
        return None
    if op in ("add", "sub"):
        return replace(uniform, value=uniform.value + (scalar if op == "add" else -scalar))
    below = min(max(scalar - uniform.value, 0.0), 1.0)
    if op in ("lt", "le"):
        return replace(uniform, kind="mask", value=1 - below)
    return replace(uniform, kind="mask", value=below) if op in ("gt", "ge") else None


def mask_on(op: str, operands: Mapping[str, Draw], shape: tuple[int, ...]) -> Mask | None:
    """The dropout that an operation on activations is by the random mask it takes, None where it is none.

    A mask per sample is stochastic depth, one per position hides tokens: neither is a dropout.
    """
    masks = [draw for name, draw in operands.items() if draw.kind == "mask" and MASKING[op] in ("", name)]
    if len(masks) != 1:
        return None
    mask = masks[0]
    sizes = (1,) * (len(shape) - len(mask.shape)) + mask.shape
    over_positions = (*shape[:2], *(1,) * (len(shape) - 2))
    by_channel = len(shape) > 2 and (sizes == over_positions or (len(shape) == 3 and sizes == (shape[0], 1, shape[2])))
    is_per_sample = math.prod(sizes[1:]) == 1
    if len(shape) < 2 or is_per_sample or (sizes != shape and not by_channel):
        return None
    return Mask(1 - mask.value if op == "masked_fill" else mask.value, sizes != shape)


def is_drawn_around_zero(product: torch.fx.Node) -> bool:
    """Whether a factor of `product` is normal noise as large as the product."""
    return any(_is_normal(factor) and _size(factor) == _size(product) for factor in product.all_input_nodes)


def _is_normal(factor: torch.fx.Node) -> bool:
    while factor.op == "call_function" and factor.all_input_nodes and not _draws_normal(factor):
        op = getattr(factor.target, "_opname", "")
        if (op not in _KEEPING and op not in ("mul", "div")) or len(factor.all_input_nodes) > 1:
            return False
        factor = factor.all_input_nodes[0]
    return _draws_normal(factor)


def _draws_normal(call: torch.fx.Node) -> bool:
    return str(getattr(call.target, "_opname", "")).rstrip("_") in ("randn", "randn_like", "normal", "normal_functional")


def _size(call: torch.fx.Node) -> int:
    value = call.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _number(target: torch.fx.Node, position: int) -> float | None:
    """A scalar argument, given by position or by one of the names it has in these operations."""
    value = target.args[position] if position < len(target.args) else None
    for name in ("fill_value", "p", "other", "value"):
        if value is None and name in target.kwargs:
            value = target.kwargs[name]
    return float(value) if isinstance(value, (bool, int, float)) else None
