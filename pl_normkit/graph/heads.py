"""Heads: from a global pooling to the last layer before an output."""

from __future__ import annotations

__all__ = ["find_heads"]

from collections.abc import Sequence

from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.structure import Head


def find_heads(nodes: Sequence[Node]) -> list[Head]:
    """The heads behind every global average pooling, in execution order of the poolings.

    A maximum alone makes none: what is read off a head (the noise that averaging keeps, NK104 and NK106) holds of averages.
    """
    return [head for node in nodes if node.is_global_pool for head in _heads_after(node)]


def _heads_after(pool: Node) -> list[Head]:
    """Every chain from `pool` to an output of the model that passes a weight layer and joins only chains from the same pool."""
    heads = []
    pending: list[tuple[Node, ...]] = [(pool,)]
    seen: set[tuple[Node, int]] = set()
    while pending:
        chain = pending.pop()
        classifier = max((i for i, node in enumerate(chain) if node.kind is Kind.WEIGHT), default=0)
        if (chain[-1], chain[classifier].index) in seen:
            continue
        seen.add((chain[-1], chain[classifier].index))
        if not chain[-1].users and classifier:
            heads.append(Head(pool, chain[1:classifier], chain[classifier]))
        pending.extend((*chain, user) for user in chain[-1].users if _goes_on(user, pool))
    return heads


def _goes_on(user: Node, pool: Node) -> bool:
    return len(user.inputs) == 1 or _averages_logits(user, pool) or _joins_poolings(user, pool)


def _averages_logits(node: Node, pool: Node) -> bool:
    """Whether `node` adds values that all come from `pool` alone (a classifier and a distilled one)."""
    pending = [*node.inputs] if node.kind is Kind.ADD else []
    if not pending:
        return False
    for source in pending:
        if source.index < pool.index or not source.inputs:
            return False
        pending.extend(before for before in source.inputs if before is not pool and before not in pending)
    return True


def _joins_poolings(node: Node, pool: Node) -> bool:
    """Whether `node` adds or concatenates poolings of one map (average beside maximum)."""
    if node.kind not in (Kind.ADD, Kind.CAT):
        return False
    for source in node.inputs:
        before = source
        while before.kind in (Kind.VIEW, Kind.MUL) and len(before.inputs) == 1:
            before = before.inputs[0]
        if before.kind is not Kind.POOL or before.inputs != pool.inputs:
            return False
    return True
