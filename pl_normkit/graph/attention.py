"""Attention written out: which softmax weighs values, which sums are its scores, and the arithmetic on the way to them."""

from __future__ import annotations

__all__ = ["feeds_attention", "is_attention", "is_pointwise", "is_score"]

from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_leaves

from pl_normkit.graph.nodes import Kind, Node, kind_of
from pl_normkit.graph.paths import main_inputs
from pl_normkit.graph.structure import PASSING

_POINTWISE_KINDS = (*PASSING, Kind.MUL, Kind.ADD, Kind.CAT, Kind.ACTIVATION)
_ARITHMETIC = """
    sub rsub div neg addcmul addcdiv lerp pow square sqrt rsqrt reciprocal exp exp2 expm1 log log1p log2 abs sign sin cos
    maximum minimum where masked_fill floor ceil round remainder nan_to_num sum cumsum prod logsumexp amax amin max min"""
_POINTWISE = frozenset(_ARITHMETIC.split())
_CHAIN_LIMIT = 24


def is_pointwise(node: Node) -> bool:
    """Whether an operation makes each element of the same elements of its operands, or of a line of them (a sum)."""
    return node.kind in _POINTWISE_KINDS or node.op in _POINTWISE or _is_tagged_pointwise(node)


def _is_tagged_pointwise(node: Node) -> bool:
    """Whether torch itself calls the operation pointwise."""
    called = node.target.target
    return node.kind is Kind.OTHER and isinstance(called, torch._ops.OpOverload) and torch.Tag.pointwise in called.tags


def is_attention(softmax: Node) -> bool:
    """Whether a softmax weighs the values of an attention written out, and not the experts that a router chooses among."""
    weighed = (user for score in _scores_from(softmax) for user in score.users)
    return any(kind_of(user.op, ()) is Kind.MATMUL and len(user.inputs) > 1 for user in weighed) and not _is_router(softmax)


def _is_router(softmax: Node) -> bool:
    """Whether it runs over the features of the layer that made the scores."""
    node = softmax.inputs[0]
    while len(node.inputs) == 1 and node.kind is not Kind.WEIGHT and node.shape == node.inputs[0].shape:
        node = node.inputs[0]
    features = _feature_of_einsum(node) if node.op == "einsum" else len(node.shape) - 1 if node.op in ("linear", "addmm", "matmul") else 1
    asks = node.arguments[:1] in (("other",), ("mat2",))  # a learned query times keys
    is_layer = node.kind is Kind.WEIGHT and len(node.inputs) == 1 and node.shape == softmax.shape and not asks
    return is_layer and int(softmax.argument("dim", 1, -1)) % len(softmax.shape) == features


def _feature_of_einsum(node: Node) -> int:
    """The dimension that its weights make, the last one where that is not known."""
    given, _, made = str(node.target.args[0]).replace(" ", "").partition("->")
    operands = tree_leaves(node.target.args[1])
    read = next((letters for letters, operand in zip(given.split(","), operands, strict=False) if operand is node.inputs[0].target), "")
    new = [position for position, letter in enumerate(made) if read and letter not in read]
    return new[0] if len(new) == 1 and "." not in made else len(node.shape) - 1


def is_score(operands: Sequence[Node], node: Node) -> bool:
    """Whether the sum `node` is a product of queries and keys with a mask or a bias added."""
    return any(map(_is_product, operands)) and feeds_attention(node)


def _is_product(end: Node) -> bool:
    node = end
    for _ in range(_CHAIN_LIMIT):
        if node.kind is Kind.MATMUL and len(node.inputs) > 1:
            return True
        if not (is_pointwise(node) or node.op in ("gather", "index")) or not node.inputs:
            return False
        node = main_inputs(node)[0]
    return False


def feeds_attention(node: Node) -> bool:
    """Whether `node` is an attention score, or a bias added to it."""
    return any(user.kind is Kind.SOFTMAX and is_attention(user) for score in _scores_from(node) for user in score.users)


def _scores_from(start: Node) -> list[Node]:
    """`start` and what scaling, masking, reshaping, dropping or mixing heads makes of it."""
    scores = [start]
    seen = {start}
    for node in scores:
        for user in node.users:
            mixes_heads = user.kind is Kind.WEIGHT and user.shape == node.shape
            passes = user.kind in (*PASSING, Kind.MUL, Kind.ADD) or user.op in ("div", "masked_fill") or mixes_heads
            if passes and user not in seen:
                seen.add(user)
                scores.append(user)
    return scores
