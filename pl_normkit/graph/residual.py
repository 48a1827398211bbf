"""Which sums are residual additions, and which join features of equal standing."""

from __future__ import annotations

__all__ = ["as_residual", "find_sums", "joins_features"]

from collections.abc import Iterator, Sequence
from itertools import pairwise

from pl_normkit.graph.attention import feeds_attention, is_pointwise, is_score
from pl_normkit.graph.gates import is_gated, is_modulated, is_noised, is_weighed, makes_gate
from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.paths import (
    CHAIN_LIMIT,
    PARTS,
    SLICES,
    Dominators,
    before_views,
    between,
    chain_back,
    goes_around,
    leading,
    main_inputs,
    part_of,
    walk_branch,
)
from pl_normkit.graph.structure import PASSING, Branch, ResidualAdd
from pl_normkit.graph.sums import Sum, sum_of, sum_of_parts

_BENDING = frozenset(("gap", "exp", "exp2", "expm1", "log", "log1p", "log2", "sin", "cos"))
_LOOKUPS = frozenset(("embedding", "embedding_bag", "index", "index_select", "gather", "take_along_dim"))
_LAYERS = (Kind.WEIGHT, Kind.ATTENTION, Kind.NORM, Kind.RESIZE, Kind.POOL, Kind.CAT, Kind.INPUT)
_LINEAR_KINDS = (Kind.VIEW, Kind.DROPOUT, Kind.MUL, Kind.ADD)
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_REGION_LIMIT = 40


def find_sums(nodes: Sequence[Node]) -> list[Sum]:
    """Additions of two or more activations in execution order."""
    dominators = Dominators(nodes)
    inner: set[Node] = set()
    sums = []
    for node in reversed(nodes):
        found = _sum_as_read(node, dominators) if node not in inner else None
        if found is not None:
            inner |= found.absorbed
            sums.append(found)
    return sums[::-1]


def _sum_as_read(node: Node, dominators: Dominators) -> Sum | None:
    """With nested additions, unless it is a residual addition, or holds one, without them."""
    parts = sum_of_parts(node, dominators)
    if parts is not None and as_residual(parts) is not None:
        return parts
    found = sum_of(node, dominators)
    if found is None or not found.absorbed or as_residual(found) is not None:
        return found
    nested = sum_of(node, dominators, is_flat=False)
    return nested if any(map(_has_identity, (nested, *(sum_of(part, dominators) for part in found.absorbed)))) else found


def _has_identity(found: Sum | None) -> bool:
    """Whether a sum by itself is an addition around an identity (a branch that ends in an adapter, folded branches that are subtracted)."""
    add = as_residual(found) if found is not None else None
    return add is not None and add.kind == "identity"


def as_residual(found: Sum) -> ResidualAdd | None:
    """The residual addition that a sum is, None where it is none.

    Two ways lead from one value, the split, and meet in the sum. It is a residual addition when

    - one way, the shortcut, hands the split on: nothing but views, pooling, a norm or a scale on it, or one linear layer
      (a projection), which a pre-activation of its own may precede. It has the full size of the sum: a statistic, a
      position or a condition that is broadcast is added to something, and is no shortcut around it.
    - every other way, the branches, computes features of the split: more layers or non-linearities than the shortcut, and not
      only arithmetic point by point (rotary embeddings, an activation written out). It may read values from elsewhere on
      its way (a time, a class, a memory); what counts is that it leads from the split.
    - a branch reads more of the split than what that leaves of another stream: stages of a residual quantizer code one value.
    - a branch ends in the sum. A value that lives on beside it was not added to the stream; the sum serves something else
      (a position that is added again to make queries and keys).
    - no branch returns to the stream that the split was taken off while that goes on around the sum (values of a first attention, which are
      added to those of later ones).
    - beside a projection a branch is no linear map (a low-rank update of the same layer), and meets no other stream of full size.
    - all ways run at the same resolutions. One that comes back from another joins levels: a fusion.
    - shortcut and branches read the same part of the split, not neighbouring slices (cascades, recurrences).
    - the sum is no attention score, no scale and shift of features (FiLM at full size, couplings of a flow), no sample around a mean
      (`mu + sigma * noise`), and no sum of contexts that are each weighed by another part of one value (FocalNet).

    The split is the last value that all paths to the operands pass. Where values from elsewhere enter a branch there is none, or one
    too far back; then it is the value nearest to the sum, on the way back along the shortcut, from which all branches lead.
    """
    ends = [operand for operand in found.operands if operand not in found.subtracted and operand.numel == found.numel]
    if (
        not ends
        or is_score(found.operands, found.node)
        or any(is_of(found) for is_of in (_is_recurrence, is_weighed, is_modulated, is_noised))
    ):
        return None
    readings = (_residual_of(found, shortcut, branches) for shortcut, branches in _readings(found, ends))
    return next((add for add in readings if add is not None), None)


def _readings(found: Sum, ends: Sequence[Node]) -> Iterator[tuple[Branch, list[Branch]]]:
    """Shortcut and branches, by the common dominator first, then back along each operand that may be a shortcut."""
    if found.split is not None:
        sides = [walk_branch(found.split, operand) for operand in found.operands]
        shortcut = min((side for side in sides if side.end in ends), key=_shortcut_rank)
        yield shortcut, [side for side in sides if side is not shortcut]
    chains = [(end, chain_back(end)) for end in ends]
    for chain in chains:
        yield from _along(found, *chain, steps=slice(0, 1))
    for chain in chains:
        yield from _along(found, *chain, steps=slice(1, None))


def _along(found: Sum, end: Node, chain: Sequence[Node], *, steps: slice) -> Iterator[tuple[Branch, list[Branch]]]:
    others = [operand for operand in found.operands if operand is not end]
    paths = [(other, between(chain[steps][-1].index, other)) for other in others] if chain[steps] else []
    for depth, split in list(enumerate(chain))[steps]:
        sides = [leading(split, other, path) for other, path in paths]
        branches = [side for side in sides if side is not None]
        outside = [other for other, side in zip(others, sides, strict=True) if side is None]
        if branches and all(other.numel < found.numel for other in outside):
            yield Branch(split, end, tuple(reversed(chain[:depth]))), branches
            return


def _residual_of(found: Sum, shortcut: Branch, branches: Sequence[Branch]) -> ResidualAdd | None:
    is_projection = bool(shortcut.of_kind(Kind.WEIGHT))
    rank = _shortcut_rank(shortcut)
    if not _is_plain(shortcut) or any(_resizes(branch) != _resizes(shortcut) for branch in branches):
        return None
    for branch in branches:
        if any(node in branch for node in shortcut.nodes):  # then they part later
            return None
        if _shortcut_rank(branch) <= rank or _only_rescales(branch) or not _ends_in(found, branch):
            return None
        if is_projection and (branch.end.numel < found.numel or _is_linear(branch) or _meets_another_stream(branch)):
            return None
        if _reads_what_is_left(branch) or _only_chooses(branch) or _returns_to_its_stream(found, branch):
            return None
        if branch.end in found.subtracted and not branch.of_kind(Kind.WEIGHT):
            return None
    if all(_reads_other_part(shortcut, branch) for branch in branches) and not _lives_on(found.node):
        return None
    return ResidualAdd(found.node, shortcut.split, shortcut, tuple(branches), "projection" if is_projection else "identity")


def _is_plain(shortcut: Branch) -> bool:
    """Linear, with at most one weight layer (or a depthwise and a pointwise one), which a pre-activation of its own may precede.

    What a value looks up in a table hands nothing of the value on, nor does its product with a fixed matrix (the first state of a scan),
    nor a gate that is spread over what it scales.
    """
    weights = shortcut.of_kind(Kind.WEIGHT)
    if any(_is_lookup(node) or _adds_up(node) or (node.kind is Kind.MATMUL and len(node.inputs) == 1) for node in shortcut.nodes):
        return False
    if any(after.kind is Kind.MUL and after.numel > before.numel for before, after in pairwise(shortcut.nodes)):
        return False
    is_separable = len(weights) == 2 and "conv" in weights[0].op and weights[0].argument("groups", 6, 1) > 1
    bends = [node for node in shortcut.nodes if node.kind in (Kind.ACTIVATION, Kind.ATTENTION, Kind.SOFTMAX) or node.op in _BENDING]
    return (len(weights) <= 1 or is_separable) and all(
        weights and node.kind is Kind.ACTIVATION and node.index < weights[0].index for node in bends
    )


def _is_lookup(node: Node) -> bool:
    """Whether the value enters as the index alone."""
    return node.op in _LOOKUPS and not {"self", "input"} & set(node.arguments)


def _adds_up(node: Node) -> bool:
    """Whether a value is summed over a dimension: what is left is no longer the value."""
    return node.op == "sum" and len(node.inputs) == 1 and node.inputs[0].op != "stack" and node.numel < node.inputs[0].numel


def _shortcut_rank(side: Branch) -> tuple[int, int, int]:
    """Sorts the sides of an addition: the fewer weights, non-linearities and operations, the more it is a shortcut."""
    nonlinear = len(side.of_kind(Kind.ACTIVATION, Kind.ATTENTION, Kind.SOFTMAX))
    others = sum(node.kind not in PASSING and node.kind not in (Kind.WEIGHT, Kind.ACTIVATION) for node in side.nodes)
    return (len(side.of_kind(Kind.WEIGHT)), nonlinear, others)


def _resizes(side: Branch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The changes of resolution by resizing: a side that alone was resized joins levels (a decoder's long skip).

    Points that are sampled for a layer to read (deformable attention) are no level.
    """
    last_layer = max((node.index for node in side.of_kind(Kind.WEIGHT)), default=-1)
    resizes = [node for node in side.nodes if node.kind is Kind.RESIZE or node.is_transposed_convolution]
    levels = [node for node in resizes if not (node.op.startswith("grid_sampler") and node.index < last_layer)]
    return [(node.inputs[0].shape[2:], node.shape[2:]) for node in levels]


def _only_rescales(branch: Branch) -> bool:
    """Whether a side is arithmetic on the split alone, as in rotary embeddings, response normalization and an activation written out.

    Also a value copied back behind the reach of gradients (straight-through estimators), and a state times activations (delta rules).
    """
    inside = {branch.split, *branch.nodes}
    return branch.end.op == "detach" or all(is_pointwise(node) or _is_step(node, inside) for node in branch.nodes)


def _is_step(node: Node, inside: set[Node]) -> bool:
    """Whether a product multiplies a value of `inside` by what is computed elsewhere at one position (a step of a recurrence)."""
    others = [before_views(source) for source in node.inputs if source not in inside]
    return node.kind is Kind.MATMUL and any(other.op in ("select", "getitem") for other in others)


def _is_linear(side: Branch) -> bool:
    """Whether a side is a linear map, a batch norm aside: beside another it is a part of one layer (low-rank updates, folded branches)."""
    return all(
        (node.kind is Kind.WEIGHT and not _is_lookup(node) and node.op not in _RECURRENT)
        or (len(node.inputs) == 1 and (node.kind in _LINEAR_KINDS or node.op == "batch_norm"))
        for node in side.nodes
    )


def _is_low_rank(sides: Sequence[Branch]) -> bool:
    """Whether linear maps of one value are summed of which one is narrower inside than at its end."""
    narrow = (node.numel < side.end.numel for side in sides for node in side.of_kind(Kind.WEIGHT))
    return all(map(_is_linear, sides)) and not any(node.op in PARTS for side in sides for node in side.nodes) and any(narrow)


def _meets_another_stream(branch: Branch) -> bool:
    """Whether a value of full size that does not come from the split enters a branch by a sum or product.

    What follows is computed of that stream: of the features that a map modulates, of the next layer's beside a skip connection.
    """
    inside = {branch.split, *branch.nodes}
    return any(
        source not in inside and source.numel == node.numel and not _leads(branch.split, source)
        for node in branch.nodes
        if node.kind in (Kind.ADD, Kind.MUL) and len(node.inputs) > 1
        for source in node.inputs
    )


def _leads(split: Node, end: Node) -> bool:
    return leading(split, end, between(split.index, end)) is not None


def _ends_in(found: Sum, branch: Branch) -> bool:
    """Whether nothing but the sum, and perhaps the model's output, takes the branch's value."""
    node = branch.end
    inside = {found.node, *found.absorbed, *found.joins}
    while True:
        if any(user.users for user in node.users if user not in inside):
            return False
        if node.kind not in PASSING or node.op in PARTS or len(node.inputs) != 1 or node.inputs[0] is branch.split:
            return True
        inside, node = {node}, node.inputs[0]


def _only_chooses(branch: Branch) -> bool:
    """Whether nothing but whole numbers comes of the split (which code of a table is nearest): no features are computed of it."""
    reached = {branch.split}
    for node in branch.nodes:
        if reached.intersection(node.inputs) and not node.holds_whole_numbers:
            reached.add(node)
    return bool(branch.nodes) and branch.end not in reached


def _reads_what_is_left(branch: Branch) -> bool:
    """Whether a branch takes of its split only what that leaves of another stream (each stage of a residual quantizer codes the rest)."""
    starts = [node for node in branch.nodes if branch.split in node.inputs]
    rests = (node for node in starts if node.op == "sub" and len(node.inputs) == 2 and node.inputs[1] is branch.split)
    return bool(starts) and sum(not _leads(branch.split, node.inputs[0]) for node in rests) == len(starts)


def _returns_to_its_stream(found: Sum, branch: Branch) -> bool:
    """Whether a branch is added to a value that its split was made of, and the result reaches an output by other ways than the sum.

    What was looked up for the values alone (value embeddings) stands beside the stream from the start. Not so for two streams that take
    turns (reversible couplings), and for one of other positions (a decoder's tokens beside its image).
    """
    if _lives_on(found.node):
        return False
    inside = {branch.split, *branch.nodes}
    return any(
        source not in inside and source.numel == node.numel and _has_its_positions(source, found.node) and goes_around(found.node, node)
        for node in branch.nodes
        if node.kind is Kind.ADD and len(node.inputs) > 1
        for source in node.inputs
        if _is_lookup(branch.split) or (source.index < branch.split.index and _leads(source, branch.split))
    )


def _has_its_positions(stream: Node, node: Node) -> bool:
    is_laid_out_alike = len(stream.shape) == len(node.shape) and stream.shape[-1] == node.shape[-1]
    return stream.shape == node.shape or not is_laid_out_alike


def _reads_other_part(shortcut: Branch, branch: Branch) -> bool:
    """Whether the two start from different slices of the split, alike in size (Res2Net's hierarchy, cascaded heads)."""
    starts = [{node for node in side.nodes if side.split in node.inputs} for side in (shortcut, branch)]
    parts = [set(map(part_of, nodes)) for nodes in starts]
    are_alike = len({node.numel for nodes in starts for node in nodes}) == 1
    return all(nodes and all(node.op in SLICES for node in nodes) for nodes in starts) and are_alike and not parts[0] & parts[1]


def _lives_on(node: Node) -> bool:
    """Whether a value goes on as a stream of its own beside what is computed of it (reversible couplings of two halves)."""
    while len(node.users) == 1 and node.users[0].kind in PASSING:
        node = node.users[0]
    return len(node.users) > 1 or all(user.kind is Kind.CAT for user in node.users)


def _is_recurrence(found: Sum) -> bool:
    """Whether operands are made, point by point, from different positions of one value (a scan over time), or all from single ones."""
    slices = [_slices_behind(operand) for operand in found.operands]
    if all(parts and all(part.op == "select" for part in parts) for parts in slices):
        return True
    sources = [{part.inputs[0]: part for part in parts} for parts in slices]
    return any(
        part_of(first[source]) != part_of(second[source])
        for index, first in enumerate(sources)
        for second in sources[index + 1 :]
        for source in first.keys() & second.keys()
        if first[source].op == "select"
    )


def _slices_behind(end: Node) -> list[Node]:
    """The slices that `end` is made of by arithmetic alone."""
    seen: set[Node] = {end}
    pending, parts = [end], []
    while pending and len(seen) < _REGION_LIMIT:
        node = pending.pop()
        if node.op in SLICES:
            parts.append(node)
        elif is_pointwise(node):
            new = [source for source in node.inputs if source not in seen]
            seen.update(new)
            pending += new
    return parts


def joins_features(found: Sum) -> bool:
    """Whether two operands or more fill the sum, and it is neither an attention score nor arithmetic on one value.

    A broadcast shift (a condition, a position) fuses nothing, nor do what is looked up in a table, products that attention or a scan sums
    up, a layer and its low-rank update, the two sides of a gate, `g * a + (1 - g) * b`, the parts of a gate that scales something larger,
    features times a scale and a shift that both come from elsewhere, and what is kept from gradients (straight-through).
    """
    rank = len(found.node.shape)
    is_addition = (found.node.kind is Kind.ADD and rank > 1) or (found.node.op == "sum" and rank > 2)
    if not is_addition or sum(operand.shape == found.node.shape for operand in found.operands) < 2:
        return False
    if feeds_attention(found.node) or _is_recurrence(found) or _adds_again(found):
        return False
    makers = [_maker(operand) for operand in found.operands]
    if any(map(_is_lookup, makers)) or any(map(_is_detached, found.operands)):
        return False
    if is_gated(found) or makes_gate(found.node) or is_weighed(found) or is_modulated(found) or is_noised(found):
        return False
    if any(maker.kind is Kind.MATMUL for maker in makers) and not any(maker.kind in _LAYERS for maker in makers):
        return False
    sides = [walk_branch(found.split, operand) for operand in found.operands] if found.split is not None else []
    return not sides or not (all(all(map(is_pointwise, side.nodes)) for side in sides) or _is_low_rank(sides))


def _maker(end: Node) -> Node:
    """The operation that made a value, seen through views, dropouts, scales and activations; of a sum, that of its last summand."""
    node = end
    for _ in range(CHAIN_LIMIT):
        if node.kind not in (*PASSING, Kind.MUL, Kind.ADD, Kind.ACTIVATION) or not node.inputs:
            break
        sources = main_inputs(node)
        node = max(sources, key=lambda source: source.index) if node.kind is Kind.ADD else sources[0]
    return node


def _is_detached(end: Node) -> bool:
    node = end
    while node.kind is Kind.VIEW and node.op != "detach" and len(node.inputs) == 1:
        node = node.inputs[0]
    return node.op == "detach"


def _adds_again(found: Sum) -> bool:
    """Whether an operand is added to what became of it while that lives on beside the sum (positions added anew in each layer)."""
    for operand in found.operands:
        for other in found.operands:
            lead = leading(operand, other, between(operand.index, other)) if operand.index < other.index else None
            if lead is not None and not _ends_in(found, lead):
                return True
    return False
