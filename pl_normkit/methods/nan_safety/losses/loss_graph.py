"""The autograd graph of a loss, read without running anything. Every search here returns nodes; the rules judge them."""

from __future__ import annotations

__all__ = [
    "LossGraph",
    "cancelling_differences",
    "fed_by_saturating",
    "is_square",
    "masked_origin",
    "read_loss_graph",
    "saturating_source",
    "smallest",
    "through",
]

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.graph.autograd import base, behind, forward_order, saved
from pl_normkit.methods.nan_safety.losses.ranges import SHAPES, UNKNOWN, Edge, Range, range_of
from pl_normkit.rules import Subject

REDUCTIONS = {"Mean", "Max", "Min", "Amax", "Amin", "Median", "Sort", "Topk"}


@dataclass
class LossGraph:
    """Nodes in forward order, with the range of every output."""

    nodes: list[Node] = field(default_factory=list)
    ranges: dict[Edge, Range] = field(default_factory=dict)

    def input_range(self, node: Node, position: int = 0) -> Range:
        edges = node.next_functions
        return self.ranges.get(edges[position], UNKNOWN) if position < len(edges) else UNKNOWN

    def named(self, *names: str) -> Iterator[Node]:
        return (node for node in self.nodes if base(node) in names)


def read_loss_graph(subject: Subject) -> LossGraph:
    """Read `subject.loss`, before its backward; a loss without a gradient gives an empty graph."""
    graph = LossGraph()
    if subject.loss is None or subject.loss.grad_fn is None:
        return graph
    graph.nodes = forward_order(subject.loss.grad_fn)
    for node in graph.nodes:
        for index in range(max(1, len(node._input_metadata))):
            range_of((node, index), graph.ranges)
    return graph


def through(node: Node, skip: Callable[[Node], bool]) -> Node | None:
    """The first node behind `node` on its first edge that `skip` does not skip."""
    current = next(iter(behind(node)), None)
    while current is not None and skip(current):
        current = next(iter(behind(current)), None)
    return current


def is_reshaping(node: Node) -> bool:
    return base(node) in SHAPES - REDUCTIONS


def scales_by_constant(node: Node) -> bool:
    return base(node) in ("Mul", "Div") and len(behind(node)) == 1


def adds_constant(node: Node) -> bool:
    return base(node) == "Add" and len(behind(node)) == 1


def mirrors(node: Node) -> bool:
    """Whether `node` is a constant minus (or minus a constant) something: 1 - sigmoid(z)."""
    return base(node) in ("Rsub", "Sub", "Neg") and len(behind(node)) == 1


def fed_by_saturating(log: Node) -> tuple[Node, bool] | None:
    """The sigmoid or softmax whose output reaches `log` by scaling, reshaping, mirroring or an added constant only.

    Returns the node and whether a constant was added (or a clamp made) on the way; None where nothing of the kind feeds it.
    """
    return saturating_source(next(iter(behind(log)), None))


def saturating_source(argument: Node | None) -> tuple[Node, bool] | None:
    """As `fed_by_saturating`, for the node that makes the logarithm's argument."""
    guarded = False
    current = argument
    while current is not None:
        if base(current) in ("Sigmoid", "Softmax"):
            return current, guarded
        if adds_constant(current):
            guarded = True
        elif not (is_reshaping(current) or scales_by_constant(current) or mirrors(current)):
            return None
        current = next(iter(behind(current)), None)
    return None


def masked_origin(node: Node) -> Node | None:
    """The boolean indexing that made the number of elements entering `node`, looked for through elementwise operations."""
    waiting = behind(node)
    shape = waiting[0]._input_metadata[0].shape if waiting and waiting[0]._input_metadata else None
    seen: set[Node] = set()
    while waiting:
        current = waiting.pop()
        if current in seen or not current._input_metadata or current._input_metadata[0].shape != shape:
            continue
        seen.add(current)
        if base(current) == "MaskedSelect" or (base(current) == "Index" and _has_boolean(saved(current, "indices"))):
            return current
        waiting += behind(current)
    return None


def _has_boolean(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices or ())


def is_square(node: Node) -> bool:
    if base(node) == "Pow":
        return bool(saved(node, "exponent") == 2)
    edges = node.next_functions
    return base(node) == "Mul" and len(edges) == 2 and edges[0][0] is not None and edges[0] == edges[1]


def cancelling_differences(graph: LossGraph) -> Iterator[Node]:
    """Differences mean(x^2) - c mean(x)^2 with c >= 0.9999 that reach a root or a logarithm unclamped."""
    for node in graph.named("Sqrt", "Rsqrt", "Log", "Log2", "Log10", "Pow"):
        if base(node) == "Pow" and not _is_fraction(saved(node, "exponent")):
            continue
        found = through(node, lambda step: is_reshaping(step) or scales_by_constant(step) or adds_constant(step))
        if found is not None and base(found) == "Sub" and len(behind(found)) == 2 and _cancels(*behind(found)):
            yield found


def _is_fraction(exponent: Any) -> bool:
    return isinstance(exponent, (int, float)) and 0 < exponent < 1


def _cancels(left: Node, right: Node) -> bool:
    coefficient = 1.0
    while scales_by_constant(right):
        value = saved(right, "other")
        if not isinstance(value, Tensor) or value.numel() != 1:
            return False
        coefficient *= float(value) if base(right) == "Mul" else 1 / float(value)
        right = behind(right)[0]
    squared_mean = is_square(right) and base(behind(right)[0]) == "Mean"
    mean_of_square = base(left) == "Mean" and is_square(behind(left)[0])
    return mean_of_square and squared_mean and coefficient >= 0.9999


def smallest(node: Node) -> float | None:
    """The smallest argument that the root, logarithm or division `node` has seen in this step; None where it is not kept."""
    name = base(node)
    if name in ("Sqrt", "Hypot"):
        return _reduced(saved(node, "result"), torch.amin, lambda value: value * value)
    if name == "Rsqrt":
        return _reduced(saved(node, "result"), torch.amax, lambda value: value**-2 if value else math.inf)
    if name == "Div":
        other = saved(node, "other")
        return _reduced(other.abs() if isinstance(other, Tensor) else None, torch.amin)
    if name == "Reciprocal":
        result = saved(node, "result")
        return _reduced(result.abs() if isinstance(result, Tensor) else None, torch.amax, lambda value: 1 / value if value else math.inf)
    if name == "Pow":
        kept = saved(node, "self")
        exponent = saved(node, "exponent")
        negative = isinstance(exponent, (int, float)) and exponent < 0
        return _reduced(kept.abs() if isinstance(kept, Tensor) and negative else kept, torch.amin)
    return _reduced(saved(node, "self"), torch.amin)


def _reduced(value: Any, reduce: Callable[[Tensor], Tensor], then: Callable[[float], float] = float) -> float | None:
    if not isinstance(value, Tensor) or value.numel() == 0 or value.is_meta or value.is_complex():
        return None
    return then(float(reduce(value.detach())))
