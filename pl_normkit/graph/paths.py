"""Ways back from an operation: who dominates it, what carries its signal, where its resize was."""

from __future__ import annotations

__all__ = [
    "CHAIN_LIMIT",
    "PARTS",
    "SLICES",
    "Dominators",
    "before_views",
    "between",
    "block_of",
    "chain_back",
    "goes_around",
    "last_resize",
    "leading",
    "main_inputs",
    "part_of",
    "walk_branch",
]

from collections.abc import Iterable, Sequence

from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.structure import Branch

SLICES = frozenset(("slice", "select", "narrow", "getitem", "index_select"))
PARTS = SLICES | {"chunk", "split", "split_with_sizes", "tensor_split", "unbind"}
CHAIN_LIMIT = 24


def block_of(module: str) -> str:
    """The longest leading part of a path whose last name ends in a digit: the block that holds the module; the path itself without one.

    >>> block_of("bert.encoder.layer.0.attention.output"), block_of("features.1.0"), block_of("mixer")
    ('bert.encoder.layer.0', 'features.1.0', 'mixer')
    """
    names = module.split(".")
    numbered = [index for index, name in enumerate(names) if name[-1:].isdigit()]
    return ".".join(names[: numbered[-1] + 1]) if numbered else module


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


def between(first: int, end: Node) -> list[Node]:
    """The main path back from `end` to the operations after index `first`, in execution order."""
    seen: set[Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node not in seen and node.index > first:
            seen.add(node)
            pending.extend(main_inputs(node))
    return sorted(seen, key=lambda node: node.index)


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


def leading(split: Node, end: Node, path: Iterable[Node]) -> Branch | None:
    """The operations of `path` that lead from `split` to `end`, None without any.

    They may read other values too: a time, a class, a memory.
    """
    fed = {split}
    lead = []
    for node in path:
        if node.index > split.index and any(source in fed for source in main_inputs(node)):
            fed.add(node)
            lead.append(node)
    return Branch(split, end, tuple(lead)) if end in fed and end is not split else None


def last_resize(node: Node) -> Node | None:
    """The resize that made `node`, looking back through everything but weight layers and joins."""
    while True:
        if node.kind is Kind.RESIZE or node.is_transposed_convolution:
            return node
        if node.kind in (Kind.WEIGHT, Kind.CAT, Kind.INPUT) or len(main_inputs(node)) != 1:
            return None
        node = main_inputs(node)[0]


def goes_around(end: Node, start: Node) -> bool:
    """Whether `start` reaches an output by another way than through `end`."""
    pending, seen = [start], {start, end}
    while pending:
        node = pending.pop()
        if not node.users:
            return True
        pending += [user for user in node.users if user not in seen]
        seen.update(node.users)
    return False


def chain_back(end: Node) -> list[Node]:
    """`end` and what lies before it on a way that could be a shortcut."""
    chain = [end]
    weights = [node for node in chain if node.kind is Kind.WEIGHT]
    while len(main_inputs(chain[-1])) == 1 and len(chain) < CHAIN_LIMIT:
        chain.append(main_inputs(chain[-1])[0])
        weights += [chain[-1]] if chain[-1].kind is Kind.WEIGHT else []
        if len(weights) > 2:
            break
    return chain


def part_of(node: Node) -> tuple[Node, str, str]:
    """What a slice takes of which value."""
    return node.inputs[0], node.op, repr((*node.target.args[1:], *node.target.kwargs.values()))


def before_views(node: Node, *, through_parts: bool = False) -> Node:
    """What `node` shows in another shape; also what it is a part of, where asked."""
    while node.kind is Kind.VIEW and len(node.inputs) == 1 and (through_parts or node.op not in PARTS):
        node = node.inputs[0]
    return node
