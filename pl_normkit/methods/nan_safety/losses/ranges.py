"""What values an autograd node can output, reasoned from the operations behind it. Derived here."""

from __future__ import annotations

__all__ = ["GUARDED", "SIGNED", "UNKNOWN", "Range", "range_of"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.graph.autograd import base, behind, saved
from pl_normkit.methods.nan_safety.diagnosis.sources import PLACE, notes_of, scalar_of

Edge = tuple[Node | None, int]


@dataclass(frozen=True)
class Range:
    """Values an operation can give: an interval, whether 0 is excluded from it, and whether we know anything at all."""

    low: float = -math.inf
    high: float = math.inf
    never_zero: bool = False
    known: bool = True

    @property
    def positive(self) -> bool:
        return self.low > 0 or (self.low >= 0 and self.never_zero)

    @property
    def reaches_zero(self) -> bool:
        return self.known and not self.never_zero and self.low <= 0 <= self.high

    @property
    def largest(self) -> float:
        """Bound of the absolute value."""
        return max(abs(self.low), abs(self.high))


SIGNED = Range()
UNKNOWN = Range(known=False)
NOT_NEGATIVE = Range(low=0.0)
GUARDED = Range(low=0.0, never_zero=True)


def range_of(edge: Edge, memo: dict[Edge, Range]) -> Range:
    """Range of the output `edge[1]` of node `edge[0]`; `memo` must hold the ranges of all nodes behind it."""
    node, _ = edge
    if node is None:
        return UNKNOWN
    if edge not in memo:
        inputs = [UNKNOWN if following is None else memo.get((following, index), UNKNOWN) for following, index in node.next_functions]
        memo[edge] = _range(node, edge[1], inputs)
    return memo[edge]


SHAPES = {
    "View", "UnsafeView", "ReshapeAlias", "Expand", "Permute", "Transpose", "T", "Squeeze", "Unsqueeze", "Slice", "Select", "Index",
    "MaskedSelect", "Gather", "Clone", "ToCopy", "Alias", "Repeat", "Flip", "Split", "SplitWithSizes", "Unbind", "IndexSelect",
    "AvgPool1D", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D", "MaxPool2DWithIndices",
    "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleTrilinear3D",
    "Max", "Min", "Amax", "Amin", "Median", "Sort", "Topk", "Roll", "RepeatInterleave", "Mean", "Squeezed", "Movedim", "Diagonal",
}  # fmt: skip
SIGNED_OPS = {
    "Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "Convolution", "ConvolutionOverrideable", "MkldnnLinear", "NativeBatchNorm",
    "CudnnBatchNorm", "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "Sub", "Rsub", "Log", "Log2", "Log10", "Log1P", "Expm1", "Tan",
    "LeakyRelu", "Logsumexp", "Cumsum", "UpsampleBicubic2D", "Atan2",
}  # fmt: skip
FIXED = {
    "Sigmoid": Range(0.0, 1.0), "Softmax": Range(0.0, 1.0), "Tanh": Range(-1.0, 1.0),
    "Sin": Range(-1.0, 1.0), "Cos": Range(-1.0, 1.0), "Erf": Range(-1.0, 1.0), "Relu": NOT_NEGATIVE, "Elu": Range(low=-1.0),
    "Gelu": Range(low=-0.17), "Silu": Range(low=-0.28), "Hardsigmoid": Range(0.0, 1.0), "LogSoftmax": Range(high=0.0),
    "LogSigmoid": Range(high=0.0), "Exp": NOT_NEGATIVE, "Exp2": NOT_NEGATIVE, "Cosh": Range(low=1.0), "Softplus": NOT_NEGATIVE,
    "Var": NOT_NEGATIVE,
    "Std": NOT_NEGATIVE, "LinalgVectorNorm": NOT_NEGATIVE, "Norm": NOT_NEGATIVE, "Cdist": NOT_NEGATIVE, "MseLoss": NOT_NEGATIVE,
    "SmoothL1Loss": NOT_NEGATIVE, "HuberLoss": NOT_NEGATIVE, "BinaryCrossEntropy": NOT_NEGATIVE, "Hypot": NOT_NEGATIVE,
    "BinaryCrossEntropyWithLogits": NOT_NEGATIVE,
}  # fmt: skip


def _range(node: Node, index: int, inputs: Sequence[Range]) -> Range:
    name = base(node)
    first = inputs[0] if inputs else UNKNOWN
    if name in _TRANSFORMS:
        return _TRANSFORMS[name](node, inputs)
    if name in FIXED:
        return FIXED[name]
    if name in ("VarMean", "StdMean"):
        return NOT_NEGATIVE if index == 0 else SIGNED
    if name in SHAPES:
        return first
    return SIGNED if name in SIGNED_OPS else UNKNOWN


def _add(node: Node, inputs: Sequence[Range]) -> Range:
    if any(following is None for following, _ in node.next_functions) or len(inputs) < 2:
        return _shifted(node, inputs)
    left, right = inputs
    if not (left.known and right.known):
        return UNKNOWN
    both = Range(left.low + right.low, left.high + right.high)
    return replace(both, never_zero=both.low >= 0 and (left.positive or right.positive))


def _shifted(node: Node, inputs: Sequence[Range]) -> Range:
    """The sum with something that needs no gradient: a number where it was recorded, else a tensor of unknown values.

    In a graph without records (a training step) it is taken for an epsilon.
    """
    if PLACE not in notes_of(node):
        return GUARDED
    number = scalar_of(node)
    known = next((value for value, (following, _) in zip(inputs, node.next_functions, strict=True) if following is not None), UNKNOWN)
    if number is None:
        return replace(NOT_NEGATIVE, known=known.known) if known.low >= 0 else UNKNOWN
    return Range(known.low + number, known.high + number, never_zero=known.low + number > 0, known=known.known) if number else known


def _subtract(node: Node, inputs: Sequence[Range]) -> Range:
    nodes = [following for following, _ in node.next_functions]
    if len(nodes) == 2 and nodes[1] is not None and nodes[0] is not None and _is_maximum_of(nodes[1], nodes[0]):
        return Range(high=0.0)
    return SIGNED


def _is_maximum_of(node: Node, source: Node) -> bool:
    """Whether `node` gives a maximum (or log-sum-exp) over the very tensor `source` made."""
    while base(node) in ("Unsqueeze", "Expand", "View", "Squeeze"):
        node = behind(node)[0]
    return base(node) in ("Amax", "Max", "Logsumexp") and behind(node)[:1] == [source]


def _multiply(node: Node, inputs: Sequence[Range]) -> Range:
    edges = node.next_functions
    if len(edges) == 2 and edges[0][0] is not None and edges[0] == edges[1]:
        return _square(inputs[0])
    if len(edges) == 2 and None in (edges[0][0], edges[1][0]):
        constant = _constant_range(node)
        variable = inputs[1] if edges[0][0] is None else inputs[0]
        return _product(variable, constant)
    return _product(*inputs) if len(inputs) == 2 else UNKNOWN


def _constant_range(node: Node) -> Range:
    for name in ("other", "self"):
        value = saved(node, name)
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            return Range(0.0, 1.0)
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            low, high = (float(bound) for bound in value.detach().aminmax())
            return Range(low, high, never_zero=low > 0 or high < 0)
    return UNKNOWN


def _product(left: Range, right: Range) -> Range:
    if not (left.known and right.known):
        return UNKNOWN
    corners = [0.0 if 0 in (a, b) else a * b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Range(min(corners), max(corners), never_zero=left.never_zero and right.never_zero)


def _square(value: Range) -> Range:
    bound = value.largest if value.known else math.inf
    return Range(0.0, bound * bound, never_zero=value.never_zero or value.low > 0)


def _divide(node: Node, inputs: Sequence[Range]) -> Range:
    edges = node.next_functions
    if len(edges) != 2:
        return UNKNOWN
    numerator = inputs[0] if edges[0][0] is not None else (_constant_range(node) if edges[1][0] is None else NOT_NEGATIVE)
    if edges[1][0] is not None:
        return _product(numerator, Range(low=0.0, never_zero=True) if inputs[1].low >= 0 and inputs[1].known else SIGNED)
    denominator = _constant_range(node)
    if not denominator.known or denominator.reaches_zero:
        return _product(numerator, NOT_NEGATIVE if denominator.low >= 0 else SIGNED)
    bounds = (1 / denominator.low, 1 / denominator.high) if denominator.low * denominator.high > 0 else (-math.inf, math.inf)
    return _product(numerator, Range(min(bounds), max(bounds), never_zero=True))


def _power(node: Node, inputs: Sequence[Range]) -> Range:
    exponent = saved(node, "exponent")
    if not isinstance(exponent, (int, float)):
        return UNKNOWN
    if exponent == 2 or (exponent > 0 and exponent % 2 == 0):
        return _square(inputs[0]) if exponent == 2 else replace(NOT_NEGATIVE, never_zero=inputs[0].never_zero)
    if inputs[0].known and inputs[0].low >= 0:
        return Range(0.0, never_zero=inputs[0].positive or exponent < 0)
    return SIGNED if inputs[0].known else UNKNOWN


def _clamp(node: Node, inputs: Sequence[Range]) -> Range:
    low, high = (_as_number(saved(node, name)) for name in ("min", "max"))
    result = inputs[0]
    if low is not None:
        result = Range(max(result.low, low), max(result.high, low), never_zero=low > 0 or (low == 0 and result.positive))
    if high is not None:
        result = replace(result, low=min(result.low, high), high=min(result.high, high))
    return result


def _as_number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value.amin()) if value.numel() else None
    return float(value) if isinstance(value, (int, float)) else None


def _maximum(node: Node, inputs: Sequence[Range]) -> Range:
    edges = node.next_functions
    constant_side = next((i for i, (following, _) in enumerate(edges) if following is None), None)
    sides = list(inputs)
    if constant_side is not None:
        value = saved(node, "other" if constant_side == 1 else "self")
        low = _as_number(value)
        sides[constant_side] = UNKNOWN if low is None else Range(low, math.inf, never_zero=low > 0)
    low = max(side.low for side in sides)
    return Range(low, max(side.high for side in sides), never_zero=low > 0 or any(side.positive for side in sides))


def _union(node: Node, inputs: Sequence[Range]) -> Range:
    if not inputs or not all(value.known for value in inputs):
        return UNKNOWN
    return Range(min(v.low for v in inputs), max(v.high for v in inputs), all(v.never_zero for v in inputs))


def _where(node: Node, inputs: Sequence[Range]) -> Range:
    constants = [following is None for following, _ in node.next_functions]
    if not any(constants):
        return _union(node, inputs)
    values = [value for value, constant in zip(inputs, constants, strict=True) if not constant]
    return _filled(values[0] if values else UNKNOWN, scalar_of(node))


def _masked_fill(node: Node, inputs: Sequence[Range]) -> Range:
    return _filled(inputs[0], scalar_of(node))


def _filled(value: Range, number: float | None) -> Range:
    """`value` with `number` in some places: a positive or unknown one is taken for the valid value that stands in for invalid ones."""
    if number is None or number > 0:
        return GUARDED
    return Range(min(value.low, number), max(value.high, number), known=value.known or number == 0)


def _sum(node: Node, inputs: Sequence[Range]) -> Range:
    value = inputs[0]
    if _sums_shifted_exponentials(node):
        return Range(low=1.0, never_zero=True)
    low, high = (0.0 if value.low >= 0 else -math.inf), (0.0 if value.high <= 0 else math.inf)
    return replace(value, low=low, high=high, never_zero=value.never_zero and (value.low >= 0 or value.high <= 0))


def _sums_shifted_exponentials(node: Node) -> bool:
    """Whether `node` sums exp(z - max z), of which one is 1."""
    exponential = next(iter(behind(node)), None)
    shift = next(iter(behind(exponential)), None) if exponential is not None and base(exponential) == "Exp" else None
    if shift is None or base(shift) != "Sub" or len(behind(shift)) != 2:
        return False
    first, second = behind(shift)
    return _is_maximum_of(second, first)


def _pad(node: Node, inputs: Sequence[Range]) -> Range:
    return replace(inputs[0], low=min(inputs[0].low, 0.0), high=max(inputs[0].high, 0.0), never_zero=False)


def _clone(node: Node, inputs: Sequence[Range]) -> Range:
    # torch.cosine_similarity clamps a clone of the norm without recording it
    return UNKNOWN if base(behind(node)[0]) == "LinalgVectorNorm" else inputs[0]


def _negate(node: Node, inputs: Sequence[Range]) -> Range:
    return replace(inputs[0], low=-inputs[0].high, high=-inputs[0].low)


_TRANSFORMS: dict[str, Callable[[Node, Sequence[Range]], Range]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Pow": _power,
    "Clamp": _clamp,
    "ClampMin": _clamp,
    "ClampMax": _clamp,
    "Hardtanh": lambda node, inputs: Range(float(saved(node, "min_val")), float(saved(node, "max_val"))),
    "Maximum": _maximum,
    "Cat": _union,
    "Stack": _union,
    "Minimum": _union,
    "Where": _where,
    "MaskedFill": _masked_fill,
    "Sum": _sum,
    "ConstantPadNd": _pad,
    "NativeDropout": _pad,
    "Neg": _negate,
    "Clone": _clone,
    "Abs": lambda node, inputs: Range(0.0, inputs[0].largest, never_zero=inputs[0].never_zero),
    "Sqrt": lambda node, inputs: Range(0.0, never_zero=inputs[0].positive),
    "Rsqrt": lambda node, inputs: GUARDED,
    "Reciprocal": lambda node, inputs: replace(GUARDED, low=0.0 if inputs[0].known and inputs[0].low >= 0 else -math.inf),
}
