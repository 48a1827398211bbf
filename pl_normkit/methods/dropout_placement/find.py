"""Reads where each active dropout stands relative to the batch norms and weight layers around it."""

from __future__ import annotations

__all__ = ["BranchDropout", "HeadDropout", "Verdict", "find_always_on", "read_branch_dropouts", "read_free_dropouts", "read_head_dropouts"]

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pl_normkit.errors import TraceError
from pl_normkit.graph import Branch, Dropout, Head, Kind, ModelGraph, Node, Norm, ResidualAdd
from pl_normkit.graph.paths import main_inputs
from pl_normkit.preserve import preserved


class Verdict(StrEnum):
    """Where a dropout stands in a branch with batch norm."""

    BEFORE_NORM = "before a batch norm"
    AFTER_LAST_WEIGHT = "after the last weight layer"
    ADMISSIBLE = "after the last batch norm and before the last weight layer"


@dataclass(frozen=True)
class BranchDropout:
    """An active dropout in a residual branch that holds a batch norm.

    Attributes:
        dropout: the dropout.
        add: the residual addition it belongs to (the innermost one).
        branch: the branch it stands in.
        verdict: its place.
        norm_after: the first batch norm that reads its output within the branch.
        slot: the weight layer the dropout belongs before; None where the branch has no admissible slot.
    """

    dropout: Dropout
    add: ResidualAdd
    branch: Branch
    verdict: Verdict
    norm_after: Norm | None
    slot: Node | None


@dataclass(frozen=True)
class HeadDropout:
    """An active dropout on the globally pooled features of a network with batch norm."""

    dropout: Dropout
    head: Head


def read_branch_dropouts(graph: ModelGraph) -> list[BranchDropout]:
    """Active dropouts in residual branches with batch norm, in execution order."""
    norms = {norm.node: norm for norm in graph.norms if norm.kind == "batch"}
    found = []
    for dropout in _active(graph):
        for add, branch in graph.branches_of(dropout.node)[:1]:
            if _holds_batch_norm(add, branch, norms):
                found.append(_judge(dropout, add, branch, norms))
    return found


def read_head_dropouts(graph: ModelGraph) -> list[HeadDropout]:
    """Active dropouts between a global average pooling and the first layer after it, in networks with batch norm before the pooling.

    Where the pooling has one position to average nothing is gained by another place, and of average and maximum joined nothing is known.
    """
    norms = [norm.node for norm in graph.norms if norm.kind == "batch"]
    active = {dropout.node: dropout for dropout in _active(graph)}
    found = {}
    for head in graph.heads:
        pools_nothing = head.pool.inputs[0].numel == head.pool.numel
        if pools_nothing or not any(norm.index < head.pool.index for norm in norms):
            continue
        for node in head.between:
            if node.kind in (Kind.WEIGHT, Kind.NORM) or len(node.inputs) > 1:
                break
            if node in active:
                found[node] = HeadDropout(active[node], head)
    return list(found.values())


def read_free_dropouts(graph: ModelGraph) -> list[tuple[Dropout, Norm]]:
    """Active dropouts whose values reach a batch norm, each with the first such norm: outside residual branches, or at the end of
    a branch without batch norm whose addition one normalizes (post-norm blocks). Noise on a gate only scales, and is left out."""
    norms = {norm.node: norm for norm in graph.norms if norm.kind == "batch"}
    found = []
    for dropout in _active(graph):
        holding = graph.branches_of(dropout.node)[:1]
        if not holding:
            reached = next((norms[node] for node in _carried(graph, dropout.node) if node in norms), None)
        else:
            reached = None if _holds_batch_norm(*holding[0], norms) else _norm_behind(holding[0][0].node, norms)
        if reached is not None:
            found.append((dropout, reached))
    return found


def find_always_on(model: nn.Module, example_inputs: Any, dropouts: Iterable[Dropout]) -> frozenset[Node]:
    """Those that drop in eval mode too (Monte Carlo dropout): training and evaluation see the same noise, so nothing shifts.

    Dropout modules follow their mode; function calls are looked up in a trace in eval mode, made only where there are any.
    """
    modules = dict(model.named_modules())
    by_module = [dropout for dropout in dropouts if isinstance(modules.get(dropout.module), _DropoutNd)]
    called = [dropout for dropout in dropouts if dropout not in by_module]
    with preserved(model):
        model.eval()
        found = {dropout.node for dropout in by_module if modules[dropout.module].training}
    if called:
        try:
            evaluated = ModelGraph.from_model(model, example_inputs, training=False)
        except TraceError:
            return frozenset(found)
        places = {(other.module, other.node.source) for other in _active(evaluated)}
        found |= {dropout.node for dropout in called if (dropout.module, dropout.node.source) in places}
    return frozenset(found)


def _active(graph: ModelGraph) -> list[Dropout]:
    return [dropout for dropout in graph.dropouts if dropout.p > 0]


def _carried(graph: ModelGraph, start: Node) -> list[Node]:
    """The operations whose signal comes from `start`, in execution order; what it gates is left out."""
    carried = {start}
    for node in graph.nodes[start.index + 1 :]:
        if any(source in carried for source in main_inputs(node)):
            carried.add(node)
    return sorted(carried - {start}, key=lambda node: node.index)


def _norm_behind(add: Node, norms: dict[Node, Norm]) -> Norm | None:
    """The batch norm that reads the sum itself."""
    node = add
    while len(node.users) == 1 and node.users[0].kind in (Kind.VIEW, Kind.DROPOUT, Kind.ACTIVATION):
        node = node.users[0]
    return next((norms[user] for user in node.users if user in norms), None)


def _holds_batch_norm(add: ResidualAdd, branch: Branch, norms: dict[Node, Norm]) -> bool:
    """Whether a batch norm stands in the branch, or in the pre-activation that it shares with a projection shortcut.

    The norm behind the addition (post-norm blocks) belongs to the trunk: of the blocks of such a network none counts.
    """
    if any(node in norms for node in branch.nodes):
        return True
    node = branch.split
    while node.kind in (Kind.ACTIVATION, Kind.VIEW) and len(node.inputs) == 1:
        node = node.inputs[0]
    return add.kind == "projection" and node in norms


def _judge(dropout: Dropout, add: ResidualAdd, branch: Branch, norms: dict[Node, Norm]) -> BranchDropout:
    after = branch.downstream(dropout.node)
    norm_after = next((norms[node] for node in after if node in norms), None)
    if norm_after is not None:
        verdict = Verdict.BEFORE_NORM
    elif any(node.kind is Kind.WEIGHT for node in after):
        verdict = Verdict.ADMISSIBLE
    else:
        verdict = Verdict.AFTER_LAST_WEIGHT
    return BranchDropout(dropout, add, branch, verdict, norm_after, _slot(branch, norms))


def _slot(branch: Branch, norms: dict[Node, Norm]) -> Node | None:
    """The one last weight layer of the branch, if no batch norm follows it."""
    weights = branch.of_kind(Kind.WEIGHT)
    last = [weight for weight in weights if not any(node.kind is Kind.WEIGHT for node in branch.downstream(weight))]
    if len(last) != 1 or any(node in norms for node in branch.downstream(last[0])):
        return None
    return last[0]
