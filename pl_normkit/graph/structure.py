"""What the operations form: residual additions with their branches, fusions, heads, attention."""

from __future__ import annotations

__all__ = ["Attention", "Branch", "Dropout", "Fusion", "FusionInput", "Head", "Norm", "ResidualAdd", "Sum", "find_sums"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pl_normkit.graph.nodes import Kind, Node

PASSING = frozenset((Kind.VIEW, Kind.DROPOUT))
"""Kinds that hand their input on unchanged in eval mode."""


@dataclass(frozen=True)
class Norm:
    """A normalization of activations.

    Attributes:
        node: the operation that divides by the standard deviation or root mean square.
        kind: which statistics it takes.
        gamma: name of the scale parameter, "" without one.
        beta: name of the shift parameter, "" without one.
        module: path of the module that holds it.
    """

    node: Node
    kind: Literal["batch", "layer", "group", "instance", "rms"]
    gamma: str
    beta: str

    @property
    def module(self) -> str:
        return self.node.module


@dataclass(frozen=True)
class Dropout:
    """A dropout on activations (not stochastic depth, not attention weights inside a fused kernel).

    `p` is torch's drop probability, 0 for one that is switched off; `by_channel` drops whole channels.
    """

    node: Node
    p: float
    by_channel: bool

    @property
    def module(self) -> str:
        return self.node.module


@dataclass(frozen=True)
class Branch:
    """One operand of a residual addition, from the split to the addition.

    Attributes:
        split: the value both sides start from.
        end: the operand of the addition.
        nodes: operations on the main path in execution order, split excluded; gates (an SE block's sigmoid side) are
            left out, since they scale the path and are not on it.
    """

    split: Node
    end: Node
    nodes: tuple[Node, ...]

    def of_kind(self, *kinds: Kind) -> list[Node]:
        return [node for node in self.nodes if node.kind in kinds]

    @cached_property
    def _members(self) -> frozenset[Node]:
        return frozenset(self.nodes)

    def __contains__(self, node: object) -> bool:
        return node in self._members

    def downstream(self, start: Node) -> list[Node]:
        """Operations of the branch that `start` feeds, in execution order, without `start`."""
        reached = {start}
        for node in self.nodes:
            if any(source in reached for source in node.inputs):
                reached.add(node)
        return [node for node in self.nodes if node in reached and node is not start]


@dataclass(frozen=True)
class ResidualAdd:
    """`shortcut + branch (+ more branches)`.

    Attributes:
        node: the (last) addition.
        split: the value the shortcut and the branches start from.
        shortcut: the side without a weight layer (identity, perhaps normalized, pooled or scaled) or with one (projection).
        branches: the other sides; parallel blocks have several.
        kind: what the shortcut is.
    """

    node: Node
    split: Node
    shortcut: Branch
    branches: tuple[Branch, ...]
    kind: Literal["identity", "projection"]


@dataclass(frozen=True)
class FusionInput:
    """One operand of a fusion.

    Attributes:
        node: the operand.
        resize: its last resize, None where it arrives at its own resolution.
        channels: first and last-plus-one channel it takes in a concatenation; None in a sum.
    """

    node: Node
    resize: Node | None
    channels: tuple[int, int] | None


@dataclass(frozen=True)
class Fusion:
    """Features of several levels joined by concatenation or sum; `consumer` is the first weight layer that reads the result."""

    node: Node
    kind: Literal["concat", "sum"]
    inputs: tuple[FusionInput, ...]
    consumer: Node | None


@dataclass(frozen=True)
class Head:
    """Global pooling, a chain of operations and the last weight layer before an output of the model.

    `between` may hold a hidden layer, norms, activations and dropouts.
    """

    pool: Node
    between: tuple[Node, ...]
    classifier: Node


@dataclass(frozen=True)
class Attention:
    """One attention product: the fused kernel, or the softmax of the unfused form."""

    node: Node
    fused: bool

    @property
    def module(self) -> str:
        return self.node.module


@dataclass(frozen=True)
class Sum:
    """An addition of activations with nested additions flattened into one list of operands."""

    node: Node
    operands: tuple[Node, ...]
    split: Node | None


def find_sums(nodes: Sequence[Node]) -> list[Sum]:
    """Additions of two or more activations; `split` is the last value all operands pass through, None if they share none."""
    dominators = Dominators(nodes)
    inner: set[Node] = set()
    sums = []
    for node in reversed(nodes):
        if node.kind is Kind.ADD and len(node.inputs) > 1 and node not in inner:
            operands, absorbed = _flatten(node)
            inner |= absorbed
            sums.append(Sum(node, tuple(operands), dominators.common(operands)))
    return sums[::-1]


def _flatten(node: Node) -> tuple[list[Node], set[Node]]:
    operands: list[Node] = []
    absorbed: set[Node] = set()
    for operand in node.inputs:
        if operand.kind is Kind.ADD and len(operand.inputs) > 1 and len(operand.users) == 1 and operand.shape == node.shape:
            below, absorbed_below = _flatten(operand)
            operands += below
            absorbed |= {operand, *absorbed_below}
        else:
            operands.append(operand)
    return operands, absorbed


class Dominators:
    """For each node the last node that every path from the model's inputs to it passes through."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._parent: dict[Node, Node | None] = {}
        self._depth: dict[Node, int] = {}
        for node in nodes:
            parent = self.common(node.inputs) if node.inputs else None
            self._parent[node] = parent
            self._depth[node] = self._depth[parent] + 1 if parent is not None else 0

    def common(self, nodes: Sequence[Node]) -> Node | None:
        """The last common dominator of `nodes` (a node counts as its own), None when they share no ancestor."""
        first: Node | None = nodes[0]
        for node in nodes[1:]:
            first = self._meet(first, node)
        return first

    def _meet(self, a: Node | None, b: Node | None) -> Node | None:
        while a is not b:
            if a is None or b is None:
                return None
            if self._depth[a] < self._depth[b]:
                a, b = b, a
            a = self._parent[a]
        return a


def main_inputs(node: Node) -> tuple[Node, ...]:
    """The inputs that carry the signal: of a product with a broadcast gate, only the gated side."""
    if node.kind is Kind.MUL and len(node.inputs) > 1:
        sizes = [source.numel for source in node.inputs]
        if min(sizes) < max(sizes):
            return tuple(source for source, size in zip(node.inputs, sizes, strict=True) if size == max(sizes))
    return node.inputs


def walk_branch(split: Node, end: Node) -> Branch:
    """The main path from `split` (excluded) to `end` (included)."""
    seen: set[Node] = set()
    pending = [end] if end is not split else []
    while pending:
        node = pending.pop()
        if node not in seen and node.index > split.index:
            seen.add(node)
            pending.extend(source for source in main_inputs(node) if source is not split)
    return Branch(split, end, tuple(sorted(seen, key=lambda node: node.index)))


def walk_from(split: Node, end: Node) -> Branch:
    """The operations that lead from `split` to `end`; they may read other values too (a memory, other tokens). Empty when none do."""
    lead = {split}
    between = walk_branch(split, end).nodes
    for node in between:
        if any(source in lead for source in main_inputs(node)):
            lead.add(node)
    return Branch(split, end, tuple(node for node in between if node in lead) if end in lead else ())


def last_resize(node: Node) -> Node | None:
    """The resize that made `node`, looking back through everything but weight layers and joins."""
    while True:
        if node.kind is Kind.RESIZE or node.is_transposed_convolution:
            return node
        if node.kind in (Kind.WEIGHT, Kind.CAT, Kind.INPUT) or len(main_inputs(node)) != 1:
            return None
        node = main_inputs(node)[0]
