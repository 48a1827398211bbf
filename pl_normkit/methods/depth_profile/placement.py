"""Where the norms of the residual branches stand, read off the graph."""

from __future__ import annotations

__all__ = [
    "Layer",
    "attends_without_norm",
    "branch_factor",
    "channel_scales",
    "ends_in_norm",
    "gain_of",
    "is_on_sphere",
    "read_layers",
]

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from pl_normkit.graph import Attention, Kind, ModelGraph, Node, ResidualAdd
from pl_normkit.graph.paths import before_views


@dataclass(frozen=True)
class Layer:
    """A residual addition of the main stream.

    Attributes:
        add: the addition.
        attends: whether its branch holds an attention.
        is_post: whether one norm alone reads the sum, and the stream goes on from what it gives (or came from such a norm).
        factor: the constant that the shortcut is multiplied by, 1 without one.
    """

    add: ResidualAdd
    attends: bool
    is_post: bool
    factor: float

    @property
    def weights(self) -> list[Node]:
        """The weight layers of its branches."""
        return [node for branch in self.add.branches for node in branch.of_kind(Kind.WEIGHT)]


def read_layers(graph: ModelGraph) -> list[Layer]:
    """The additions of the main stream with a weight layer in a branch, in depth order."""
    adds = [add for add in graph.residual_adds if any(branch.of_kind(Kind.WEIGHT) for branch in add.branches)]
    nested = {add.node for add in adds if any(add.node in branch for other in adds if other is not add for branch in other.branches)}
    attending = {attention.node for attention in graph.attentions}
    norms = {norm.module for norm in graph.norms}
    origins = {add: before_views(add.split, through_parts=True).module for add in adds}
    splits = norms.intersection(origins.values())
    return [
        Layer(
            add,
            any(node in attending for branch in add.branches for node in branch.nodes),
            _one_norm_reads(add.node, norms) and bool(splits & {add.node.users[0].module, origins[add]}),
            math.prod(_factors(add.shortcut.nodes)),
        )
        for add in adds
        if add.node not in nested
    ]


def _one_norm_reads(value: Node, norms: set[str]) -> bool:
    readers = {user.module for user in value.users}
    return len(readers) == 1 and readers <= norms


def _factors(nodes: Iterable[Node]) -> Iterator[float]:
    """Constants that values are multiplied by."""
    for node in nodes:
        if node.kind is Kind.MUL and len(node.inputs) == 1 and not node.reads:
            yield from (float(value) for value in node.target.args if isinstance(value, (int, float)))


def attends_without_norm(graph: ModelGraph, attention: Attention) -> bool:
    """Whether queries and keys are linear in a sum of the residual stream that no norm has seen.

    What stands before the second residual addition (embeddings, positions that a layer adds to them) has not grown with depth and is no
    such sum, nor is one that starts from what a norm gave (positions that a convolution adds within the branch); convolutions are left out.
    """
    norms = {norm.node for norm in graph.norms}
    layers = [add for add in graph.residual_adds if any(branch.of_kind(Kind.WEIGHT) for branch in add.branches)]
    sums = {add.node for add in layers[1:] if before_views(add.split, through_parts=True) not in norms}
    norm_modules = {norm.module for norm in graph.norms if norm.module}
    seen: set[Node] = set()
    waiting = list(attention.node.inputs[:2] if attention.fused else attention.node.inputs)
    reached = False
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in norms or node.module in norm_modules or "conv" in node.op or "norm" in node.op:
            return False
        if node in sums:
            reached = True
        else:
            waiting.extend(node.inputs)
    return reached


def gain_of(node: Node, model: nn.Module) -> float | None:
    """Standard deviation of a linear layer's matrix over that of Xavier's initialisation; None for another layer, and without values."""
    parameters = dict(model.named_parameters())
    matrices = [parameters[name] for name in node.parameters if name in parameters and parameters[name].dim() == 2]
    if len(matrices) != 1 or matrices[0].is_meta:
        return None
    spread = float(matrices[0].detach().double().square().mean().sqrt())
    return spread * math.sqrt(sum(matrices[0].shape) / 2)


def branch_factor(layer: Layer) -> float:
    """The constant that its branch is multiplied by before its first or behind its last weight layer, 1 without one."""
    first, last = layer.weights[0].index, layer.weights[-1].index
    outside = [node for branch in layer.add.branches for node in branch.nodes if not first < node.index < last]
    return math.prod(_factors(outside))


def channel_scales(layer: Layer) -> list[str]:
    """Parameters of one value a channel that multiply what its last weight layer gave, but for those of a norm."""
    behind = [node for branch in layer.add.branches for node in branch.nodes if node.index > layer.weights[-1].index]
    if any(node.kind is Kind.NORM for node in behind):
        return []
    return [node.reads[0].parameter for node in behind if node.kind is Kind.MUL and len(node.inputs) == 1 and len(node.reads) == 1]


def ends_in_norm(layer: Layer) -> bool:
    """Whether a norm stands behind the last weight layer of its branch."""
    return any(node.kind is Kind.NORM for branch in layer.add.branches for node in branch.nodes if node.index > layer.weights[-1].index)


def is_on_sphere(layers: list[Layer]) -> bool:
    """Whether the stream goes on from every sum divided by its length, and from that alone (a pre-norm that divides leaves the sum too)."""
    return all(_is_divided_by_length(layer.add.node) for layer in layers)


def _is_divided_by_length(total: Node) -> bool:
    measured = [user for user in total.users if "vector_norm" in user.op]
    return bool(measured) and all(user in measured or (user.op == "div" and user.inputs[0] is total) for user in total.users)
