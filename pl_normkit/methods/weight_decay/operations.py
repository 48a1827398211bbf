"""The role of a parameter by the operation that reads it: by which argument, and where among the residual branches."""

from __future__ import annotations

__all__ = ["Context", "read_roles"]

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from pl_normkit.graph import Branch, Kind, ModelGraph, Node, Norm, Read, ResidualAdd, Step
from pl_normkit.graph.nodes import kind_of
from pl_normkit.graph.paths import before_views
from pl_normkit.methods.weight_decay.roles import Role
from pl_normkit.methods.weight_decay.walks import chain_before, first_use

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


_PRODUCTS = (Kind.MATMUL, Kind.WEIGHT)


def read_roles(context: Context) -> dict[str, Role]:
    """The role of every parameter that the graph reads, by name."""
    graph = context.graph
    found: dict[str, set[Role]] = defaultdict(set)
    for norm in graph.norms:
        for name, role in ((norm.gamma, context.gamma_role(norm)), (norm.beta, Role.BETA)):
            if name:
                found[name].add(role)
    named, queries, computed = set(found), set(), set()
    for node in graph.nodes:
        for read in node.reads:
            if read.parameter not in named:
                role = _role_of(read, node, context)
                found[read.parameter].add(role)
                if role is Role.TOKEN and node.kind in (Kind.WEIGHT, Kind.MATMUL, Kind.ATTENTION):
                    queries.add(read.parameter)
                if role is Role.POSITION and any(kind_of(step.op, ()) in _PRODUCTS for step in read.path[:-1]):
                    computed.add(read.parameter)
    for name in queries:  # what asks is also added to what the answer gives; a positional embedding never asks alone
        found[name].discard(Role.POSITION)
    for name in computed:  # a recurrent matrix times a first state of zeros, added to the input's share
        found[name] -= {Role.POSITION} if Role.WEIGHT in found[name] else set()
    return {name: min(roles, key=_PRECEDENCE.index) for name, roles in found.items()}


@dataclass(frozen=True)
class Place:
    """The innermost residual addition an operation belongs to; `side` is None for gates, which are on no main path."""

    add: ResidualAdd
    side: Branch | None

    @property
    def on_shortcut(self) -> bool:
        return self.side is self.add.shortcut


class Context:
    """A graph with each operation's place among the residual additions; `shapes` are those of the parameters by name."""

    def __init__(self, graph: ModelGraph, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.graph = graph
        self.shapes = shapes

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
        """Whether no weight layer, no other norm and no attention follows `node` in its residual branch."""
        place = self.places.get(node)
        if place is None or place.side is None:
            return False
        return not any(after.kind in _ENDED_BY or _is_weight_layer(after) for after in place.side.downstream(node))

    def scales_residual(self, node: Node) -> bool:
        """Whether a factor in `node` scales a whole branch or its shortcut: at their end, or in the addition (`addcmul`, `lerp`)."""
        place = self.places.get(node)
        on_end = place is not None and (place.on_shortcut or self.ends_branch(node))
        return on_end or node in self._residual_nodes

    @cached_property
    def _residual_nodes(self) -> set[Node]:
        return {add.node for add in self.graph.residual_adds}

    @cached_property
    def attention_softmaxes(self) -> set[Node]:
        return {attention.node for attention in self.graph.attentions if not attention.fused}

    def reaches_attention_logits(self, node: Node, *, through_product: bool = False) -> bool:
        """Whether `node` is part of what an attention softmax reads, with only sums, factors and masks on the way.
        `through_product` lets the way pass the product of queries and keys.
        """
        return any(self._enters_softmax(source, user, through_product) for source, user in self._logit_way(node, through_product))

    def joins_attention_logits(self, node: Node) -> bool:
        """Whether `node` is added, on its way to an attention softmax, to scores of queries with keys."""
        way = list(self._logit_way(node, through_product=False))
        if any(user.kind is Kind.ATTENTION and _enters_logits(source, user, through_product=False) for source, user in way):
            return True
        sums = [(source, user) for source, user in way if user.op in ("add", "sub", "baddbmm")]
        added = any(_holds_scores(other) for source, user in sums for other in user.inputs if other is not source)
        return added and self.reaches_attention_logits(node)

    def _enters_softmax(self, source: Node, user: Node, through_product: bool) -> bool:
        return user in self.attention_softmaxes or (user.kind is Kind.ATTENTION and _enters_logits(source, user, through_product))

    def _logit_way(self, node: Node, through_product: bool) -> Iterator[tuple[Node, Node]]:
        """Every (operation, its user) that what `node` gives may pass on the way to a softmax, users that end the way included."""
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            for user in current.users:
                yield current, user
                passes = user.kind in _LOGIT_KINDS or user.op in _LOGIT_OPS or (through_product and _is_product(user))
                if passes and user not in seen:
                    seen.add(user)
                    pending.append(user)


_ENDED_BY = (Kind.NORM, Kind.MATMUL, Kind.SOFTMAX, Kind.ATTENTION)
_LOGIT_KINDS = (Kind.VIEW, Kind.DROPOUT, Kind.ADD, Kind.MUL, Kind.CAT)
_LOGIT_OPS = ("div", "sub", "masked_fill", "where", "gather", "index", "take_along_dim", "copy", "slice_scatter", "index_put")


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
    """A weight layer with something to learn (a fixed blur kernel is none), be it in the network that makes its kernel.

    A module that could not be read (`graph.gaps`) is taken for one.
    """
    if node.op == "gap":
        return True
    if node.kind is Kind.WEIGHT:
        return bool(node.reads) or "weight" in node.arguments
    return node.kind is Kind.OTHER and any(_role_by_argument(read.path[-1]) is Role.WEIGHT for read in node.reads)


def _is_product(node: Node) -> bool:
    return node.kind is Kind.MATMUL and len(node.inputs) > 1


def _holds_scores(node: Node) -> bool:
    """Whether a product of two activations is among what `node` sums, scales and masks."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if _is_product(current):
            return True
        if current.kind in _LOGIT_KINDS or current.op in _LOGIT_OPS:
            pending += [source for source in current.inputs if source not in seen]
            seen.update(current.inputs)
    return False


def _enters_logits(source: Node, attention: Node, through_product: bool) -> bool:
    arguments = {"attn_mask": attention.argument("attn_mask", 3, None)}
    if through_product:
        arguments |= {"query": attention.argument("query", 0, None), "key": attention.argument("key", 1, None)}
    return any(argument is source.target for argument in arguments.values())


def _role_of(read: Read, node: Node, context: Context) -> Role:
    """The role in which one operation reads a parameter that is no norm's scale or shift."""
    first, rest = read.path[0], read.path[1:]
    if first.op not in _LOOKUPS or first.argument not in ("weight", "self", "input"):
        return _role_on_path(read, read.path, node, context)
    if not rest:
        return _role_of_lookup_by_input(read, node, context)
    role = _role_on_path(read, rest, node, context)
    if first.op not in _TABLES or role is Role.RELATIVE_POSITION:
        return role
    return Role.POSITION if _has_row_for_each(first, rest[0].shape) else Role.EMBEDDING


def _role_on_path(read: Read, path: Sequence[Step], node: Node, context: Context) -> Role:
    first, last = path[0], path[-1]
    kind = kind_of(first.op, ())
    if kind is Kind.NORM and first.argument != "input":
        return _role_in_norm(first, is_constant=len(path) > 1)
    if first.op == "prelu" and first.argument == "weight":
        return Role.SLOPE
    if any(step.op in ("sin", "cos") for step in path):
        return Role.POSITION
    if kind is Kind.WEIGHT and first.argument != "input":
        return _role_in_weight_layer(first)
    if kind_of(last.op, ()) is Kind.WEIGHT:
        role = _role_in_weight_layer(last)
        return Role.GAIN if role is Role.WEIGHT and _multiplies_weight(path) else role
    if last.op in ("matmul", "mm", "add", "sub") and _multiplies_weight(path):
        return Role.GAIN
    by_operation = _ROLE_BY_OPERATION.get(last.op)
    return by_operation(read, last, node, context) if by_operation else _role_by_argument(last)


def _role_in_norm(step: Step, *, is_constant: bool) -> Role:
    """A norm that reads activations is in the graph's list with its scale; one of a table alone stands in no branch."""
    if step.argument == "bias":
        return Role.BETA
    return Role.GAMMA_TRUNK if step.argument == "weight" and is_constant else Role.UNKNOWN


def _role_in_weight_layer(step: Step) -> Role:
    if step.argument == "params":
        return Role.WEIGHT if len(step.shape) > 1 else Role.BIAS
    if step.argument == "bias" or (step.op == "addmm" and step.argument == "self"):
        return Role.BIAS
    if step.argument in ("weight", "mat1", "mat2"):
        return Role.WEIGHT
    return Role.TOKEN


def _multiplies_weight(path: Sequence[Step]) -> bool:
    """Whether the parameter, which is smaller than the weight it ends in, is multiplied over it (and is no factor of a product)."""
    first, last = path[0], path[-1]
    if math.prod(first.shape) >= math.prod(last.shape):
        return False
    for step, after in pairwise(path):
        if kind_of(step.op, ()) is Kind.MATMUL or step.op == "kron":
            return False
        if math.prod(step.shape) != math.prod(first.shape):
            return False
        if step.op in _FACTORS and math.prod(after.shape) > math.prod(step.shape):
            return True
    return False


def _role_by_argument(step: Step) -> Role:
    """Of an operation that is not known (a cell, a grouped product, a kernel of a library) the argument's name tells."""
    name = step.argument
    if name.startswith(("bias", "b_")) or name.endswith("_bias"):
        return Role.BIAS
    is_matrix = sum(size > 1 for size in step.shape) > 1
    names_weight = name.startswith(("weight", "w_")) or name.endswith("_weight") or name in ("mat2", "w", "kernel")
    return Role.WEIGHT if names_weight and is_matrix else Role.UNKNOWN


def _role_of_lookup_by_input(read: Read, node: Node, context: Context) -> Role:
    """A table looked up by the input is an embedding; the experts a router chose are weights, and shifts where they are added."""
    if read.path[0].op in _TABLES:
        counts_positions = any(source.op == "cumsum" for source in chain_before(node.inputs))
        return Role.POSITION if counts_positions and _has_row_for_each(read.path[0], node.shape) else Role.EMBEDDING
    user = first_use(node)
    if user is not None and user.kind in (Kind.MATMUL, Kind.WEIGHT):
        return Role.RELATIVE_POSITION if context.joins_attention_logits(user) else Role.WEIGHT
    if user is not None and user.kind is Kind.ADD and any(_is_from_product(source) for source in user.inputs):
        return Role.BIAS
    reaches_logits = user is not None and user.kind is Kind.ADD and context.reaches_attention_logits(user)
    return Role.RELATIVE_POSITION if reaches_logits else Role.EMBEDDING


def _has_row_for_each(table: Step, looked_up: Sequence[int]) -> bool:
    positions = looked_up[-2] if len(looked_up) > 1 else 1
    return table.shape[0] >= positions > 1


def _is_from_product(node: Node) -> bool:
    """Whether `node` is a matrix product of activations with weights, seen through views (no convolution, no linear layer)."""
    source = before_views(node, through_parts=True)
    is_kernel = source.kind is Kind.OTHER and any(_role_by_argument(read.path[-1]) is Role.WEIGHT for read in source.reads)
    return is_kernel or kind_of(source.op, ()) is Kind.MATMUL


def _in_attention(_: Read, last: Step, node: Node, context: Context) -> Role:
    return Role.RELATIVE_POSITION if last.argument == "attn_mask" else Role.TOKEN


def _in_sum(read: Read, last: Step, node: Node, context: Context) -> Role:
    if context.reaches_attention_logits(node):
        return Role.RELATIVE_POSITION
    extents = sum(size > 1 for size in last.shape)
    if extents <= 1 or len(context.shapes.get(read.parameter, last.shape)) == 1:
        return Role.BIAS
    if any(_is_split_over_heads(source, last.shape) for source in node.inputs):
        return Role.BIAS
    is_of_product = any(_is_from_product(source) for source in node.inputs)
    return Role.BIAS if is_of_product and not _spans_positions(last.shape, node.shape) else Role.POSITION


def _is_split_over_heads(source: Node, shape: Sequence[int]) -> bool:
    """Whether `source` is what a layer gave, its features in as many rows and columns as `shape` has."""
    made = before_views(source, through_parts=True)
    return (
        made.kind is Kind.WEIGHT and made is not source and made.shape[-1:] == (math.prod(shape),) and len(made.shape) < len(source.shape)
    )


def _spans_positions(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a summand differs along every dimension of the whole but the first, the batch."""
    aligned = (*[1] * (len(whole) - len(shape)), *shape)
    return all(size > 1 or full == 1 for size, full in zip(aligned[1:], whole[1:], strict=True))


def _in_product(read: Read, last: Step, node: Node, context: Context) -> Role:
    """A table multiplied with queries is added to their scores with the keys; without those the parameter is the query itself.

    One multiplied with what indices or shapes alone give is looked up by them (one-hot vectors, weights of an interpolation).
    """
    if last.op == "baddbmm" and last.argument == "self":
        return Role.RELATIVE_POSITION if context.reaches_attention_logits(node) else Role.BIAS
    if any(source.shape == node.shape and _holds_scores(source) for source in node.inputs):  # mixes heads
        return Role.WEIGHT
    if not context.reaches_attention_logits(node):
        return Role.EMBEDDING if _is_of_indices(node) else Role.WEIGHT
    return Role.RELATIVE_POSITION if context.joins_attention_logits(node) else Role.TOKEN


def _is_of_indices(node: Node) -> bool:
    """Whether whole numbers that the model was called with are all that an operation reads beside its parameter."""
    sources = dict.fromkeys(node.inputs)
    for source in (pending := list(sources)):
        if source.reads or (not source.inputs and not source.holds_whole_numbers):
            return False
        pending += [before for before in source.inputs if before not in sources]
        sources.update(dict.fromkeys(source.inputs))
    return bool(sources)


def _as_factor(_: Read, last: Step, node: Node, context: Context) -> Role:
    extents = sum(size > 1 for size in last.shape)
    by_head = not last.shape or last.shape[-1] == 1
    if by_head and context.reaches_attention_logits(node, through_product=True):
        return Role.TEMPERATURE
    if extents <= 1 and context.scales_residual(node):
        return Role.LAYER_SCALE
    if extents == 0 and not any(_is_weight_layer(after) for after in context.graph.downstream(node)):
        return Role.TEMPERATURE
    if extents > 1 and _becomes_kernel(node):
        return Role.WEIGHT
    return Role.GAIN if extents <= 1 else Role.UNKNOWN


def _becomes_kernel(node: Node) -> bool:
    """Whether what `node` gives is the kernel or matrix of a layer, scaled and in another shape (modulated convolutions)."""
    while node.users:
        user = node.users[-1]
        if user.kind is Kind.WEIGHT:
            return dict(zip(user.inputs, user.arguments, strict=True)).get(node) == "weight"
        if user.kind not in (Kind.MUL, Kind.VIEW) and user.op != "div":
            return False
        node = user
    return False


def _in_addcmul(read: Read, last: Step, node: Node, context: Context) -> Role:
    if last.argument != "self" and any(add.node is node for add in context.graph.residual_adds):
        return Role.LAYER_SCALE
    return (_in_sum if last.argument == "self" else _as_factor)(read, last, node, context)


def _in_lerp(read: Read, last: Step, node: Node, context: Context) -> Role:
    return (_as_factor if last.argument == "weight" else _as_token)(read, last, node, context)


def _in_sampling(_: Read, last: Step, node: Node, context: Context) -> Role:
    """A table read at points between its cells: positions where what is found is added to features, else a grid of features."""
    user = first_use(node)
    is_added = user is not None and user.kind is Kind.ADD and len(user.inputs) > 1
    return Role.POSITION if is_added and last.argument == "input" else Role.EMBEDDING


def _as_token(_: Read, last: Step, node: Node, context: Context) -> Role:
    """What joins the activations as a value of its own; a table that fills a part of the attention scores is one of positions."""
    fills = last.op in ("where", "masked_fill", "copy", "slice_scatter", "index_put")
    return Role.RELATIVE_POSITION if fills and context.reaches_attention_logits(node) else Role.TOKEN


_TABLES = ("embedding", "embedding_bag")
_LOOKUPS = (*_TABLES, "index", "index_select", "gather", "take_along_dim")
_FACTORS = ("mul", "div", "_weight_norm", "_weight_norm_interface")
_ROLE_BY_OPERATION: dict[str, Callable[[Read, Step, Node, Context], Role]] = {
    "scaled_dot_product_attention": _in_attention,
    **dict.fromkeys(("add", "sub"), _in_sum),
    **dict.fromkeys(("mul", "div"), _as_factor),
    "addcmul": _in_addcmul,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _in_sampling),
    "lerp": _in_lerp,
    **dict.fromkeys(("matmul", "mm", "bmm", "einsum", "baddbmm"), _in_product),
    **dict.fromkeys(("cat", "concat", "stack", "where", "masked_fill", "index_put", "copy", "slice_scatter"), _as_token),
}
