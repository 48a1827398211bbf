"""What the operations form, as plain data: residual additions with their branches, fusions, heads, attention."""

from __future__ import annotations

__all__ = ["PASSING", "Attention", "Branch", "Dropout", "Fusion", "FusionInput", "Head", "Norm", "ResidualAdd"]

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
