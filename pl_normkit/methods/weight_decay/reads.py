"""Roles from the graph: which operation reads a parameter, by which argument, and where that operation stands."""

from __future__ import annotations

__all__ = ["Context", "core_gammas", "read_roles"]

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pl_normkit.graph import Branch, Kind, ModelGraph, Node, Norm, Read, ResidualAdd, Step
from pl_normkit.graph.nodes import kind_of
from pl_normkit.methods.weight_decay.roles import Role

_PRECEDENCE = (
    Role.GAMMA_SHORTCUT,
    Role.GAMMA_TRUNK,
    Role.GAMMA_LAST,
    Role.GAMMA_BRANCH,
    Role.BETA,
    Role.EMBEDDING,
    Role.RELATIVE_POSITION,
    Role.POSITION,
    Role.LAYER_SCALE,
    Role.TEMPERATURE,
    Role.TOKEN,
    Role.SLOPE,
    Role.GAIN,
    Role.BIAS,
    Role.WEIGHT,
    Role.UNKNOWN,
)
"""Which role a parameter gets that is read in several: the special over the common, the undecayed scale over the decayed one."""


def read_roles(context: Context) -> dict[str, Role]:
    """The role of every parameter that the graph reads, by name."""
    graph = context.graph
    found: dict[str, set[Role]] = defaultdict(set)
    for norm in graph.norms:
        for name, role in ((norm.gamma, context.gamma_role(norm)), (norm.beta, Role.BETA)):
            if name:
                found[name].add(role)
    named = set(found)
    for node in graph.nodes:
        for read in node.reads:
            if read.parameter not in named:
                found[read.parameter].add(_role_of(read, node, context))
    return {name: min(roles, key=_PRECEDENCE.index) for name, roles in found.items()}


def core_gammas(context: Context) -> frozenset[str]:
    """Scales of batch norms that the derivation speaks about: post-activation branches of plain convolutions, their shortcuts,
    and the stem before the first of them."""
    plain = {add.node for add in context.graph.residual_adds if _is_post_activation(add)}
    first_split = min((place.add.split.index for place in context.places.values()), default=-1)
    stem_counts = any(add.node in plain and add.split.index == first_split for add in context.graph.residual_adds)
    core = set()
    for norm in context.graph.norms:
        place = context.places.get(norm.node)
        in_plain = place is not None and place.add.node in plain
        in_stem = place is None and stem_counts and norm.node.index <= first_split
        if norm.kind == "batch" and norm.gamma and (in_plain or in_stem):
            core.add(norm.gamma)
    return frozenset(core)


def _is_post_activation(add: ResidualAdd) -> bool:
    """Convolution before norm in every branch, a norm after the last convolution, and no depthwise convolution."""
    for branch in add.branches:
        steps = [node for node in branch.nodes if node.kind in (Kind.NORM, Kind.WEIGHT, Kind.ATTENTION, Kind.SOFTMAX)]
        if not steps or steps[0].kind is not Kind.WEIGHT or steps[-1].kind is not Kind.NORM or any(map(_is_depthwise, steps)):
            return False
    return True


def _is_depthwise(node: Node) -> bool:
    return node.op.startswith("conv") and len(node.shape) > 2 and int(node.argument("groups", 6, 1)) == node.shape[1] > 1


@dataclass(frozen=True)
class Place:
    """The innermost residual addition an operation belongs to; `side` is None for gates, which are on no main path."""

    add: ResidualAdd
    side: Branch | None

    @property
    def on_shortcut(self) -> bool:
        return self.side is self.add.shortcut


class Context:
    """A graph with each operation's place among the residual additions."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph

    @cached_property
    def places(self) -> dict[Node, Place]:
        """Operations between the split and the addition of a residual addition; the smallest one counts."""
        regions = [(add, _region(add, self.graph.nodes)) for add in self.graph.residual_adds]
        places: dict[Node, Place] = {}
        for add, region in sorted(regions, key=lambda pair: len(pair[1])):
            sides = (add.shortcut, *add.branches)
            for node in region:
                places.setdefault(node, Place(add, next((side for side in sides if node in side), None)))
        return places

    def gamma_role(self, norm: Norm) -> Role:
        """The role of a norm's scale, by where the norm stands."""
        place = self.places.get(norm.node)
        if place is None:
            return Role.GAMMA_TRUNK
        if place.on_shortcut:
            return Role.GAMMA_SHORTCUT
        return Role.GAMMA_LAST if self.ends_branch(norm.node) else Role.GAMMA_BRANCH

    def ends_branch(self, node: Node) -> bool:
        """Whether no weight layer and no other norm follows `node` in its residual branch."""
        place = self.places.get(node)
        if place is None or place.side is None:
            return False
        return not any(after.kind is Kind.NORM or _is_weight_layer(after) for after in place.side.downstream(node))

    @cached_property
    def attention_softmaxes(self) -> set[Node]:
        return {attention.node for attention in self.graph.attentions if not attention.fused}

    def reaches_attention_logits(self, node: Node, *, through_product: bool = False) -> bool:
        """Whether `node` is part of what an attention softmax reads, with only sums, factors and masks on the way.

        `through_product` lets the way pass the product of queries and keys.
        """
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            for user in current.users:
                if user in self.attention_softmaxes or (user.kind is Kind.ATTENTION and _enters_logits(current, user, through_product)):
                    return True
                passes = user.kind in _LOGIT_KINDS or user.op in _LOGIT_OPS or (through_product and _is_product(user))
                if passes and user not in seen:
                    seen.add(user)
                    pending.append(user)
        return False


_LOGIT_KINDS = (Kind.VIEW, Kind.DROPOUT, Kind.ADD, Kind.MUL, Kind.CAT)
_LOGIT_OPS = ("div", "sub", "masked_fill", "where")


def _region(add: ResidualAdd, nodes: Sequence[Node]) -> set[Node]:
    """Operations that the split feeds and that feed the addition, both left out."""
    between = nodes[add.split.index + 1 : add.node.index]
    fed = {add.split}
    for node in between:
        if any(source in fed for source in node.inputs):
            fed.add(node)
    feeding = {add.node}
    for node in reversed(between):
        if any(user in feeding for user in node.users):
            feeding.add(node)
    return (fed & feeding) - {add.split, add.node}


def _is_weight_layer(node: Node) -> bool:
    """A weight layer with something to learn (a fixed blur kernel is none)."""
    return node.kind is Kind.WEIGHT and bool(node.reads)


def _is_product(node: Node) -> bool:
    return node.kind is Kind.MATMUL and len(node.inputs) > 1


def _enters_logits(source: Node, attention: Node, through_product: bool) -> bool:
    arguments = {"attn_mask": attention.argument("attn_mask", 3, None)}
    if through_product:
        arguments |= {"query": attention.argument("query", 0, None), "key": attention.argument("key", 1, None)}
    return any(argument is source.target for argument in arguments.values())


def _role_of(read: Read, node: Node, context: Context) -> Role:
    """The role in which one operation reads a parameter that is no norm's scale or shift."""
    first, last = read.path[0], read.path[-1]
    if first.op in ("embedding", "embedding_bag") and first.argument == "weight":
        return _role_of_table(read, node, context)
    if kind_of(first.op, ()) is Kind.WEIGHT:
        return _role_in_weight_layer(first)
    if kind_of(first.op, ()) is Kind.NORM and first.argument != "input":
        return Role.BETA if first.argument == "bias" else Role.UNKNOWN
    if first.op == "prelu" and first.argument == "weight":
        return Role.SLOPE
    if any(step.op in ("sin", "cos") for step in read.path):
        return Role.POSITION
    if kind_of(last.op, ()) is Kind.WEIGHT:
        role = _role_in_weight_layer(last)
        return Role.GAIN if role is Role.WEIGHT and math.prod(first.shape) < math.prod(last.shape) else role
    return _ROLE_BY_OPERATION.get(last.op, _unknown)(last, node, context)


def _role_in_weight_layer(step: Step) -> Role:
    if step.argument == "params":
        return Role.WEIGHT if len(step.shape) > 1 else Role.BIAS
    if step.argument == "bias" or (step.op == "addmm" and step.argument == "self"):
        return Role.BIAS
    if step.argument in ("weight", "mat1", "mat2"):
        return Role.WEIGHT
    return Role.TOKEN


def _role_of_table(read: Read, node: Node, context: Context) -> Role:
    """A table looked up by the input is an embedding, one looked up by constants is what its rows are used for."""
    looked_up = node.shape if len(read.path) == 1 else read.path[1].shape
    positions = looked_up[-2] if len(looked_up) > 1 else 1
    has_row_for_each = read.path[0].shape[0] >= positions > 1
    if len(read.path) == 1:
        counts_positions = any(source.op == "cumsum" for source in _chain_before(node.inputs))
        return Role.POSITION if counts_positions and has_row_for_each else Role.EMBEDDING
    if _is_logit_term(read.path[-1], node, context):
        return Role.RELATIVE_POSITION
    return Role.POSITION if has_row_for_each else Role.EMBEDDING


def _chain_before(inputs: Sequence[Node]) -> list[Node]:
    """What made the indices of a lookup, back to the input."""
    chain: list[Node] = []
    pending = list(inputs)
    while pending and len(chain) < 20:
        node = pending.pop()
        chain.append(node)
        pending.extend(node.inputs)
    return chain


def _is_logit_term(last: Step, node: Node, context: Context) -> bool:
    if last.op == "scaled_dot_product_attention":
        return last.argument == "attn_mask"
    return last.op in ("add", "sub") and context.reaches_attention_logits(node)


def _in_attention(last: Step, node: Node, context: Context) -> Role:
    return Role.RELATIVE_POSITION if _is_logit_term(last, node, context) else Role.TOKEN


def _in_sum(last: Step, node: Node, context: Context) -> Role:
    if _is_logit_term(last, node, context):
        return Role.RELATIVE_POSITION
    extents = sum(size > 1 for size in last.shape)
    if extents == 0:
        return Role.UNKNOWN
    return Role.BIAS if extents == 1 else Role.POSITION


def _in_product(_: Step, node: Node, context: Context) -> Role:
    return Role.RELATIVE_POSITION if context.reaches_attention_logits(node) else Role.WEIGHT


def _as_factor(last: Step, node: Node, context: Context) -> Role:
    if context.reaches_attention_logits(node, through_product=True):
        return Role.TEMPERATURE
    place = context.places.get(node)
    if place is not None and (place.on_shortcut or context.ends_branch(node)):
        return Role.LAYER_SCALE
    is_scalar = math.prod(last.shape) == 1
    feeds_weights = any(_is_weight_layer(after) for after in context.graph.downstream(node))
    return Role.TEMPERATURE if is_scalar and not feeds_weights else Role.UNKNOWN


def _in_addcmul(last: Step, node: Node, context: Context) -> Role:
    if last.argument != "self" and any(add.node is node for add in context.graph.residual_adds):
        return Role.LAYER_SCALE
    return (_in_sum if last.argument == "self" else _as_factor)(last, node, context)


def _as_token(_: Step, __: Node, ___: Context) -> Role:
    return Role.TOKEN


def _unknown(_: Step, __: Node, ___: Context) -> Role:
    return Role.UNKNOWN


_ROLE_BY_OPERATION: dict[str, Callable[[Step, Node, Context], Role]] = {
    "scaled_dot_product_attention": _in_attention,
    **dict.fromkeys(("add", "sub"), _in_sum),
    **dict.fromkeys(("mul", "div"), _as_factor),
    "addcmul": _in_addcmul,
    **dict.fromkeys(("matmul", "mm", "bmm", "einsum", "baddbmm"), _in_product),
    **dict.fromkeys(("cat", "concat", "stack", "where", "masked_fill", "index_put"), _as_token),
}
