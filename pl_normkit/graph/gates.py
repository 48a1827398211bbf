"""Sums of which one side scales or shifts another: gates, modulation, weighed contexts, samples around a mean."""

from __future__ import annotations

__all__ = ["is_gated", "is_modulated", "is_noised", "is_weighed", "makes_gate"]

from collections.abc import Sequence

from pl_normkit.graph.masks import is_drawn_around_zero
from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.paths import PARTS, before_views, chain_back, part_of
from pl_normkit.graph.structure import PASSING
from pl_normkit.graph.sums import Sum

_SQUASHING = frozenset(("sigmoid", "hardsigmoid", "tanh", "softmax"))


def is_gated(found: Sum) -> bool:
    """Whether one operand is scaled by what is left of the other's gate (highway networks, gated recurrent units by hand)."""
    factors = [set(operand.inputs) if operand.kind is Kind.MUL else set() for operand in found.operands]
    return any(
        source in other
        for mine in factors
        for rest in mine
        if rest.op in ("rsub", "sub") and len(rest.inputs) == 1
        for source in rest.inputs
        for other in factors
        if other is not mine
    )


def makes_gate(node: Node) -> bool:
    """Whether a sum, squashed, scales channels or positions of something larger and does nothing else (CBAM's two statistics)."""
    is_squashed = False
    while len(node.users) == 1 and (node.users[0].kind in PASSING or node.users[0].op in _SQUASHING):
        node = node.users[0]
        is_squashed |= node.op in _SQUASHING
    return is_squashed and all(user.kind is Kind.MUL and user.numel > node.numel for user in node.users)


def is_modulated(found: Sum) -> bool:
    """Whether one operand is features times a scale, and the other a shift that is made beside the scale and apart from the features.

    A gate for each channel in front of a shift of full size modulates nothing: the sum joins two maps (a global attention upsample).
    """
    for product in found.operands:
        is_scaled = product.kind is Kind.MUL and all(factor.numel == product.numel for factor in product.inputs)
        factors = [chain_back(factor) for factor in product.inputs] if is_scaled else []
        shifts = [chain_back(operand) for operand in found.operands if operand is not product]
        if len(factors) == 2 and all(_is_beside_one(shift, *factors) for shift in shifts):
            return True
    return False


def _is_beside_one(shift: Sequence[Node], first: Sequence[Node], second: Sequence[Node]) -> bool:
    meetings = [max((node.index for node in set(shift) & set(factor)), default=-1) for factor in (first, second)]
    return meetings[0] != meetings[1] and max(meetings) < shift[0].index


def is_weighed(found: Sum) -> bool:
    """Whether each operand is scaled by a part of its own of one value (contexts that a layer weighs): none is handed on."""
    weighers = []
    for operand in found.operands:
        node = operand
        while (node.kind in PASSING or node.kind is Kind.ADD) and len(node.inputs) == 1 and node.op not in PARTS:
            node = node.inputs[0]
        weighers.append({part_of(part) for part in map(before_views, node.inputs) if part.op in PARTS} if node.kind is Kind.MUL else set())
    sources = [{part[0] for part in parts} for parts in weighers]
    return bool(set.intersection(*sources)) and len(set.union(*weighers)) >= len(weighers)


def is_noised(found: Sum) -> bool:
    """Whether an operand is noise of its own size, scaled: the sum is a sample (a variational code, noisy routing)."""
    return any(before_views(operand).kind is Kind.MUL and is_drawn_around_zero(before_views(operand).target) for operand in found.operands)
