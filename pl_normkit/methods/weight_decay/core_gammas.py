"""The scales that the derivation speaks about: those of plain convolutional networks with post-activation branches."""

from __future__ import annotations

__all__ = ["core_blocks", "core_gammas"]

from pl_normkit.graph import Kind, Node, ResidualAdd
from pl_normkit.methods.weight_decay.operations import Context


def core_blocks(context: Context) -> set[Node]:
    """The residual additions of post-activation branches of plain convolutions."""
    return {add.node for add in context.graph.residual_adds if _is_post_activation(add)}


def core_gammas(context: Context) -> frozenset[str]:
    """Scales of batch norms that the derivation speaks about: post-activation branches of plain convolutions, their shortcuts,
    and the stem before the first of them."""
    plain = core_blocks(context)
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
