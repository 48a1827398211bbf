"""Shapes in a loss that broadcast to more elements than both operands have: (N, 1) against (N,)."""

from __future__ import annotations

__all__ = ["broadcasts"]

import math
from itertools import zip_longest

from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.first_step.autograd_nodes import GraphView, output_shape, saved_tensor
from pl_normkit.first_step.facts import Broadcast
from pl_normkit.graph.autograd import base

Shape = tuple[int, ...]
_ELEMENTWISE = {
    "Sub": "subtraction",
    "Add": "addition",
    "Mul": "multiplication",
    "Div": "division",
    "Rsub": "subtraction",
    "Maximum": "maximum",
    "Minimum": "minimum",
}
_LOSSES = {"MseLoss": "mse_loss", "SmoothL1Loss": "smooth_l1_loss", "HuberLoss": "huber_loss"}
_EXPLICIT = frozenset(("Unsqueeze", "Transpose", "Permute", "T", "Repeat", "Movedim"))
"""Whoever writes one of these in front of an operation means it to broadcast."""


def broadcasts(graph: GraphView) -> tuple[Broadcast, ...]:
    """Those of the loss, and of what follows the last weight layer, that nobody asked for."""
    found: dict[Broadcast, None] = {}
    for node in graph.tail:
        seen = _of_loss(node) if base(node) in _LOSSES else _of_operation(graph, node) if base(node) in _ELEMENTWISE else None
        if seen is not None and _is_unasked(seen):
            found[seen] = None
    return tuple(found)


def _of_loss(node: Node) -> Broadcast | None:
    output, target = saved_tensor(node, "self"), saved_tensor(node, "target")
    if output is None or target is None or output.shape != target.shape:
        return None
    shapes = []
    for value, (edge, index) in zip((output, target), (*node.next_functions, (None, 0), (None, 0)), strict=False):
        if edge is None:
            shapes.append(_before_expansion(value))
        else:
            if base(edge) == "Expand" and _is_explicit(edge):
                return None
            shapes.append(_operand_shape(edge, index) or tuple(value.shape))
    return Broadcast(_LOSSES[base(node)], shapes[0], shapes[1], tuple(output.shape))


def _of_operation(graph: GraphView, node: Node) -> Broadcast | None:
    result = output_shape(node)
    edges = node.next_functions
    if result is None or not edges or any(edge is not None and _is_explicit(edge) for edge, _ in edges):
        return None
    shapes = [None if edge is None else _operand_shape(edge, index) for edge, index in edges]
    shapes += [None] * (2 - len(shapes))
    unknown = [position for position, shape in enumerate(shapes) if shape is None]
    if len(unknown) == 1:
        position = unknown[0]
        known = shapes[1 - position]
        assert known is not None
        kept = saved_tensor(node, ("self", "other")[position])
        shapes[position] = _before_expansion(kept) if kept is not None else _other_operand(graph, node, known, result)
    left, right = shapes[:2]
    return None if left is None or right is None else Broadcast(_ELEMENTWISE[base(node)], left, right, result)


def _is_explicit(edge: Node) -> bool:
    inner = edge.next_functions[0][0] if base(edge) == "Expand" and edge.next_functions else edge
    return inner is not None and base(inner) in _EXPLICIT


def _operand_shape(edge: Node, index: int) -> Shape | None:
    if base(edge) == "Expand":
        return tuple(int(size) for size in edge._saved_self_sym_sizes)  # type: ignore[attr-defined]
    if base(edge) == "AccumulateGrad":
        return tuple(edge.variable.shape)  # type: ignore[attr-defined]
    return output_shape(edge, index)


def _before_expansion(value: Tensor) -> Shape:
    """The shape a tensor had before it was expanded: there its strides are 0."""
    shape = [1 if stride == 0 else size for size, stride in zip(value.shape, value.stride(), strict=True)]
    while shape and shape[0] == 1 and value.stride()[len(value.shape) - len(shape)] == 0:
        shape.pop(0)
    return tuple(shape)


def _other_operand(graph: GraphView, node: Node, known: Shape, result: Shape) -> Shape | None:
    """The shape of an operand that nothing keeps, told from the values of the sum or difference that the next node keeps.

    Along a dimension where only `known` varies, differences between two columns that `known` shares do not change.
    """
    padded = (1,) * (len(result) - len(known)) + known
    free = [dim for dim, size in enumerate(padded) if size == 1 and result[dim] > 1]  # the other operand varies here
    kept = _value_of(graph, node)
    if not free or kept is None or tuple(kept.shape) != result or base(node) not in ("Sub", "Add", "Rsub"):
        return None
    varying = kept.double()
    for dim in free:
        varying = varying - varying.narrow(dim, 0, 1)
    tolerance = 1e-5 * float(kept.abs().amax())
    if not math.isfinite(tolerance) or float(varying.abs().amax()) <= tolerance:
        return None
    shape = []
    for dim, size in enumerate(result):
        is_constant = dim not in free and float((varying - varying.narrow(dim, 0, 1)).abs().amax()) <= tolerance
        shape.append(1 if is_constant else size)
    while shape and shape[0] == 1:
        shape.pop(0)
    return tuple(shape)


def _value_of(graph: GraphView, node: Node, depth: int = 2) -> Tensor | None:
    """What `node` computed, where a node behind it keeps it, as it is or scaled by a constant."""
    for user, position in graph.users[node]:
        value = saved_tensor(user, ("self", "other", "")[min(position, 2)])
        if value is not None:
            return value
        factor = saved_tensor(user, "other") if base(user) in ("Div", "Mul") and depth else None
        if factor is None or (base(user) == "Mul" and (factor.numel() != 1 or not bool(factor))):
            continue
        scaled = _value_of(graph, user, depth - 1)
        if scaled is not None:
            return scaled * factor if base(user) == "Div" else scaled / factor
    return None


def _is_unasked(seen: Broadcast) -> bool:
    """More elements than both, ranks that differ (a loss function asks for equal shapes), and one size that came in twice."""
    size = math.prod(seen.result)
    if size <= max(math.prod(seen.left), math.prod(seen.right)):
        return False
    if len(seen.left) == len(seen.right) and seen.op not in _LOSSES.values():
        return False
    by_left, by_right = set(), set()
    for result, left, right in zip_longest(reversed(seen.result), reversed(seen.left), reversed(seen.right), fillvalue=1):
        if result > 1 and right == 1:
            by_left.add(result)
        if result > 1 and left == 1:
            by_right.add(result)
    return bool(by_left & by_right)
