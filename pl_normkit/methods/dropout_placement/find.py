"""Reads where each active dropout stands relative to the batch norms and weight layers around it."""

from __future__ import annotations

__all__ = ["BranchDropout", "HeadDropout", "Verdict", "read_branch_dropouts", "read_free_dropouts", "read_head_dropouts"]

from dataclasses import dataclass
from enum import StrEnum

from pl_normkit.graph import Branch, Dropout, Head, Kind, ModelGraph, Node, Norm, ResidualAdd


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
            if _batch_norms_of(branch, norms):
                found.append(_judge(dropout, add, branch, norms))
    return found


def read_head_dropouts(graph: ModelGraph) -> list[HeadDropout]:
    """Active dropouts between a global pooling and the first layer after it, in networks with batch norm before the pooling."""
    norms = [norm.node for norm in graph.norms if norm.kind == "batch"]
    active = {dropout.node: dropout for dropout in _active(graph)}
    found = {}
    for head in graph.heads:
        if not any(norm.index < head.pool.index for norm in norms):
            continue
        for node in head.between:
            if node.kind in (Kind.WEIGHT, Kind.NORM):
                break
            if node in active:
                found[node] = HeadDropout(active[node], head)
    return list(found.values())


def read_free_dropouts(graph: ModelGraph) -> list[tuple[Dropout, Norm]]:
    """Active dropouts in no residual branch whose output reaches a batch norm, each with the first such norm."""
    norms = {norm.node: norm for norm in graph.norms if norm.kind == "batch"}
    found = []
    for dropout in _active(graph):
        if not graph.branches_of(dropout.node):
            reached = next((norms[node] for node in graph.downstream(dropout.node) if node in norms), None)
            if reached is not None:
                found.append((dropout, reached))
    return found


def _active(graph: ModelGraph) -> list[Dropout]:
    return [dropout for dropout in graph.dropouts if dropout.p > 0]


def _batch_norms_of(branch: Branch, norms: dict[Node, Norm]) -> list[Norm]:
    inside = [norms[node] for node in branch.nodes if node in norms]
    entry = _entry_norm(branch, norms)
    return [*([entry] if entry else []), *inside]


def _entry_norm(branch: Branch, norms: dict[Node, Norm]) -> Norm | None:
    """The norm of a pre-activation that branch and projection shortcut share: it stands just before the split."""
    node = branch.split
    while node.kind in (Kind.ACTIVATION, Kind.VIEW) and len(node.inputs) == 1:
        node = node.inputs[0]
    return norms.get(node)


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
