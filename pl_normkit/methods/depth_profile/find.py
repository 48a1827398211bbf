"""The residual additions of a traced model, with what it takes to recognize them while the model runs."""

from __future__ import annotations

__all__ = ["Addition", "Call", "find_additions"]

from collections import Counter
from dataclasses import dataclass

from pl_normkit.graph import ModelGraph, ResidualAdd
from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.paths import block_of

_CHANNELS_SECOND = frozenset(("batch_norm", "group_norm", "instance_norm"))


@dataclass(frozen=True)
class Call:
    """One executed addition: the `number`-th of the `total` that a source line runs in a forward pass."""

    source: str
    number: int
    total: int


@dataclass(frozen=True)
class Addition:
    """A residual addition.

    Attributes:
        module: path of the module that adds.
        source: `file.py:line` of the addition.
        block: path of the block it belongs to: that of the adding module or, where this has no number, of the branch's first weight.
        call: the addition itself.
        shortcut_call: the addition that the shortcut enters directly; `call` unless several branches are added.
        shortcut_operand: which operand of it the shortcut is.
        channel_axis: axis of the stream that holds the channels.
        width: number of channels.
        is_nested: whether it stands inside the branch of another addition, so that it is no step of the main stream.
        parameters: names of the parameters that its branches read.
        attentions: number of attention products in its branches.
    """

    module: str
    source: str
    block: str
    call: Call
    shortcut_call: Call
    shortcut_operand: int
    channel_axis: int
    width: int
    is_nested: bool
    parameters: tuple[str, ...]
    attentions: int = 0


def find_additions(graph: ModelGraph) -> list[Addition]:
    """The residual additions whose branches hold a weight layer, in depth order; those nested in a branch are marked."""
    calls = _calls(graph)
    adds = [add for add in graph.residual_adds if any(branch.of_kind(Kind.WEIGHT) for branch in add.branches)]
    nested = {add.node for add in adds if any(add.node in branch for other in adds if other is not add for branch in other.branches)}
    attending = {attention.node for attention in graph.attentions}
    found = []
    for add in adds:
        entered = _entered_by(add, calls)
        if entered is not None:
            (node, operand), axis = entered, _channel_axis(add)
            names = dict.fromkeys(name for branch in add.branches for inner in branch.nodes for name in inner.parameters)
            found.append(
                Addition(
                    add.node.module,
                    add.node.source,
                    _block_of(add),
                    calls[add.node],
                    calls[node],
                    operand,
                    axis,
                    add.node.shape[axis],
                    add.node in nested,
                    tuple(names),
                    sum(inner in attending for branch in add.branches for inner in branch.nodes),
                )
            )
    return found


def _block_of(add: ResidualAdd) -> str:
    block = block_of(add.node.module)
    weight = next(node for branch in add.branches for node in branch.of_kind(Kind.WEIGHT))
    return block if block[-1:].isdigit() else block_of(weight.module)


def _calls(graph: ModelGraph) -> dict[Node, Call]:
    """Which execution of its source line each addition of two activations is."""
    sums = [node for node in graph.nodes if node.kind is Kind.ADD and len(node.inputs) == 2]
    totals = Counter(node.source for node in sums)
    before: Counter[str] = Counter()
    calls = {}
    for node in sums:
        calls[node] = Call(node.source, before[node.source], totals[node.source])
        before[node.source] += 1
    return calls


def _entered_by(add: ResidualAdd, calls: dict[Node, Call]) -> tuple[Node, int] | None:
    """The addition that has the shortcut for an operand, and which one: the addition itself, or one of those summed up in it."""
    pending = [add.node]
    while pending:
        node = pending.pop()
        if node not in calls:
            continue
        if add.shortcut.end in node.inputs:
            return node, node.inputs.index(add.shortcut.end)
        pending.extend(source for source in node.inputs if source.kind is Kind.ADD)
    return None


def _channel_axis(add: ResidualAdd) -> int:
    """1 where the first layer of the branch is a convolution or a norm over axis 1; else the last axis, as for tokens."""
    if len(add.node.shape) < 3:
        return -1
    for node in add.branches[0].nodes:
        if node.kind in (Kind.WEIGHT, Kind.NORM):
            return 1 if "conv" in node.op or node.op in _CHANNELS_SECOND else -1
    return -1
