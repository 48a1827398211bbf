"""Ways from an operation to those before and behind it, with views left out."""

from __future__ import annotations

__all__ = ["chain_before", "first_use"]

from collections.abc import Sequence

from pl_normkit.graph import Kind, Node


def first_use(node: Node) -> Node | None:
    """The first operation but views that reads `node`."""
    while node.users:
        node = node.users[0]
        if node.kind is not Kind.VIEW:
            return node
    return None


def chain_before(inputs: Sequence[Node]) -> list[Node]:
    """What made the indices of a lookup, back to the input."""
    chain: list[Node] = []
    pending = list(inputs)
    while pending and len(chain) < 20:
        node = pending.pop()
        chain.append(node)
        pending.extend(node.inputs)
    return chain
