"""Which fusions join features of several levels, and what each of their branches is."""

from __future__ import annotations

__all__ = ["Join", "JoinBranch", "describe_resize", "read_joins"]

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pl_normkit.graph import Fusion, Kind, ModelGraph, Node


@dataclass(frozen=True)
class JoinBranch:
    """One operand: `resize` is the last resize on its way that the other branches do not share, None without one."""

    node: Node
    width: int
    resize: Node | None


@dataclass(frozen=True)
class Join:
    """A fusion with nested concatenations flattened.

    Attributes:
        node: the operation that joins.
        kind: concatenation along channels, or sum.
        branches: in channel or operand order.
        consumer: the first weight layer that reads the result, None without one.
    """

    node: Node
    kind: Literal["concat", "sum"]
    branches: tuple[JoinBranch, ...]
    consumer: Node | None

    @property
    def is_multi_level(self) -> bool:
        """Whether a branch comes from another resolution: that makes a fusion of levels. Gates of one value per channel have no levels."""
        return math.prod(self.node.shape[2:]) > 1 and any(branch.resize is not None for branch in self.branches)


def read_joins(graph: ModelGraph) -> list[Join]:
    """Every fusion of the graph; a concatenation that only another concatenation reads is part of that one."""
    by_node = {fusion.node: fusion for fusion in graph.fusions}
    inner = {fusion.node for fusion in graph.fusions if _is_inner(fusion, by_node)}
    return [_join(fusion, by_node, inner) for fusion in graph.fusions if fusion.node not in inner]


def _is_inner(fusion: Fusion, by_node: dict[Node, Fusion]) -> bool:
    users = fusion.node.users
    outer = by_node.get(users[0]) if len(users) == 1 else None
    return fusion.kind == "concat" and outer is not None and outer.kind == "concat"


def _join(fusion: Fusion, by_node: dict[Node, Fusion], inner: set[Node]) -> Join:
    operands = list(_operands(fusion, by_node, inner))
    ancestors = [_ancestors(operand) for operand in operands]
    common = frozenset.intersection(*ancestors)
    branches = [
        JoinBranch(operand, operand.shape[1] if len(operand.shape) > 1 else 1, _last_resize(own - common))
        for operand, own in zip(operands, ancestors, strict=True)
    ]
    return Join(fusion.node, fusion.kind, tuple(branches), fusion.consumer)


def _operands(fusion: Fusion, by_node: dict[Node, Fusion], inner: set[Node]) -> Iterator[Node]:
    for operand in fusion.inputs:
        if fusion.kind == "concat" and operand.node in inner:
            yield from _operands(by_node[operand.node], by_node, inner)
        else:
            yield operand.node


def _ancestors(node: Node) -> frozenset[Node]:
    seen = {node}
    pending = [node]
    while pending:
        new = [source for source in pending.pop().inputs if source not in seen]
        seen.update(new)
        pending += new
    return frozenset(seen)


def _last_resize(nodes: frozenset[Node]) -> Node | None:
    resizes = [node for node in nodes if node.kind is Kind.RESIZE or node.is_transposed_convolution]
    return max(resizes, key=lambda node: node.index, default=None)


_METHODS = {"nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic", "trilinear": "trilinear", "linear": "linear"}


def describe_resize(resize: Node | None) -> str:
    """`bilinear 2x2 to 16x16 (file.py:12)`; "" for none, or one that keeps the size."""
    if resize is None or resize.inputs[0].shape[2:] == resize.shape[2:]:
        return ""
    method = next((name for word, name in _METHODS.items() if word in resize.op), resize.op.replace("_", " "))
    sizes = ["x".join(map(str, shape[2:])) for shape in (resize.inputs[0].shape, resize.shape)]
    where = resize.source or resize.module
    return f"{method} {sizes[0]} to {sizes[1]}" + (f" ({where})" if where else "")
