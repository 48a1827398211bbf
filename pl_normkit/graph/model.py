"""`ModelGraph`: the traced model in the words rules use."""

from __future__ import annotations

__all__ = ["ModelGraph"]

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.structure import (
    PASSING,
    Attention,
    Branch,
    Dropout,
    Fusion,
    FusionInput,
    Head,
    Norm,
    ResidualAdd,
    Sum,
    find_sums,
    last_resize,
    walk_branch,
)
from pl_normkit.graph.trace import trace

_NORMS: dict[str, Literal["batch", "layer", "group", "instance", "rms"]] = {
    "batch_norm": "batch",
    "layer_norm": "layer",
    "native_layer_norm": "layer",
    "group_norm": "group",
    "instance_norm": "instance",
    "rms_norm": "rms",
}


@dataclass
class ModelGraph:
    """One training-mode forward pass of a model, as operations and as the structures they form.

    Attributes:
        nodes: the operations on activations in execution order.
    """

    nodes: list[Node]

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any) -> ModelGraph:
        """Trace `model` in training mode; the model, its buffers, mode and every RNG stay as they are.

        Args:
            model: any module, also on the meta device. A compiled module is read through to the original.
            example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, nested containers allowed;
                a batch of one is repeated where a batch norm needs two samples.

        Raises:
            TraceError: when `torch.export` cannot read the model; the message names the line.
        """
        original = getattr(model, "_orig_mod", model)
        return cls(trace(original, example_inputs))

    @cached_property
    def calls(self) -> Counter[tuple[str, str]]:
        """How often each (module path, operation) runs in one forward pass; more than once for shared modules."""
        return Counter((node.module, node.op) for node in self.nodes)

    @cached_property
    def norms(self) -> list[Norm]:
        found = [_module_norm(node) for node in self.nodes if node.kind is Kind.NORM]
        return sorted([*found, *_written_out_norms(self.nodes)], key=lambda norm: norm.node.index)

    @cached_property
    def dropouts(self) -> list[Dropout]:
        return [Dropout(node, node.drop_probability, node.op.startswith("feature")) for node in self.nodes if node.kind is Kind.DROPOUT]

    @cached_property
    def pools(self) -> list[Node]:
        return [node for node in self.nodes if node.kind is Kind.POOL]

    @cached_property
    def resizes(self) -> list[Node]:
        return [node for node in self.nodes if node.kind is Kind.RESIZE or node.is_transposed_convolution]

    @cached_property
    def residual_adds(self) -> list[ResidualAdd]:
        """Additions of a shortcut and branches that start from one value, nested ones included, in execution order."""
        return [add for found in self._sums if (add := _as_residual(found)) is not None]

    @cached_property
    def fusions(self) -> list[Fusion]:
        """Concatenations along channels and those sums of equally shaped values that are no residual additions."""
        residual = {add.node for add in self.residual_adds}
        sums = [_sum_fusion(found) for found in self._sums if found.node not in residual and _joins_equals(found)]
        concats = [fusion for node in self.nodes if (fusion := _concat_fusion(node)) is not None]
        return sorted([*sums, *concats], key=lambda fusion: fusion.node.index)

    @cached_property
    def heads(self) -> list[Head]:
        return [head for node in self.nodes if node.is_global_pool for head in _heads_after(node)]

    @cached_property
    def attentions(self) -> list[Attention]:
        fused = [Attention(node, fused=True) for node in self.nodes if node.kind is Kind.ATTENTION]
        unfused = [Attention(node, fused=False) for node in self.nodes if node.kind is Kind.SOFTMAX and _is_attention(node)]
        return sorted([*fused, *unfused], key=lambda attention: attention.node.index)

    @cached_property
    def _sums(self) -> list[Sum]:
        return find_sums(self.nodes)

    def branches_of(self, node: Node) -> list[tuple[ResidualAdd, Branch]]:
        """The residual branches that hold `node`, innermost first."""
        holding = [(add, branch) for add in self.residual_adds for branch in add.branches if node in branch]
        return sorted(holding, key=lambda pair: len(pair[1].nodes))

    def downstream(self, start: Node) -> list[Node]:
        """Every operation `start` feeds, in execution order."""
        reached = {start}
        for node in self.nodes[start.index + 1 :]:
            if any(source in reached for source in node.inputs):
                reached.add(node)
        return [node for node in self.nodes[start.index + 1 :] if node in reached]


def _module_norm(node: Node) -> Norm:
    gamma, beta = ([*node.parameters, "", ""])[:2]
    return Norm(node, _NORMS[node.op], gamma, beta)


def _written_out_norms(nodes: list[Node]) -> list[Norm]:
    """Norms spelled as arithmetic: x * rsqrt(mean(x^2) + eps) is RMS, (x - mean) * rsqrt(var + eps) is layer norm."""
    found = []
    for node in nodes:
        if node.op not in ("mul", "div") or len(node.inputs) != 2:
            continue
        root = next((source for source in node.inputs if source.op in ("rsqrt", "sqrt", "pow")), None)
        if root is None or (root.op == "rsqrt") is not (node.op == "mul"):
            continue
        signal = next(source for source in node.inputs if source is not root)
        statistic = _statistic_behind(root)
        if statistic is not None:
            kind: Literal["layer", "rms"] = "layer" if signal.op == "sub" or statistic.op == "var" else "rms"
            gamma, beta = _affine_after(node)
            found.append(Norm(node, kind, gamma, beta))
    return found


def _statistic_behind(root: Node) -> Node | None:
    node = root
    for _ in range(4):
        if node.op in ("var", "mean"):
            return node
        if len(node.inputs) != 1:
            return None
        node = node.inputs[0]
    return None


def _affine_after(node: Node) -> tuple[str, str]:
    gamma = beta = ""
    for _ in range(4):
        if len(node.users) != 1 or len(node.users[0].inputs) != 1:
            break
        node = node.users[0]
        if node.kind is Kind.MUL and node.parameters and not gamma:
            gamma = node.parameters[0]
        elif node.kind is Kind.ADD and node.parameters and gamma:
            beta = node.parameters[0]
        elif node.kind is not Kind.VIEW:
            break
    return gamma, beta


def _as_residual(found: Sum) -> ResidualAdd | None:
    if found.split is None:
        return None
    sides = [walk_branch(found.split, operand) for operand in found.operands]
    if any(_changes_resolution_back(side) for side in sides):
        return None
    shortcut = min(sides, key=_shortcut_rank)
    branches = tuple(side for side in sides if side is not shortcut)
    weights = len(shortcut.of_kind(Kind.WEIGHT))
    is_plain = weights <= 1 and not shortcut.of_kind(Kind.ACTIVATION, Kind.ATTENTION, Kind.SOFTMAX)
    if not is_plain or any(_shortcut_rank(branch) <= _shortcut_rank(shortcut) for branch in branches):
        return None
    kind: Literal["identity", "projection"] = "projection" if any(node.parameters for node in shortcut.nodes) else "identity"
    return ResidualAdd(found.node, found.split, shortcut, branches, kind)


def _shortcut_rank(side: Branch) -> tuple[int, int, int]:
    """Sorts the sides of an addition: the fewer weights, non-linearities and operations, the more it is a shortcut."""
    nonlinear = len(side.of_kind(Kind.ACTIVATION, Kind.ATTENTION, Kind.SOFTMAX))
    others = sum(node.kind not in PASSING and node.kind not in (Kind.WEIGHT, Kind.ACTIVATION) for node in side.nodes)
    return (len(side.of_kind(Kind.WEIGHT)), nonlinear, others)


def _changes_resolution_back(side: Branch) -> bool:
    """A side that was resized joins levels (a decoder's long skip): that is a fusion, not a residual branch."""
    return any(node.kind is Kind.RESIZE or node.is_transposed_convolution for node in side.nodes)


def _joins_equals(found: Sum) -> bool:
    """Whether at least two operands fill the sum: a broadcast shift (a condition, a position) is no fusion."""
    return sum(operand.shape == found.node.shape for operand in found.operands) > 1


def _sum_fusion(found: Sum) -> Fusion:
    inputs = tuple(FusionInput(operand, last_resize(operand), None) for operand in found.operands)
    return Fusion(found.node, "sum", inputs, _next_weight(found.node))


def _concat_fusion(node: Node) -> Fusion | None:
    if node.op not in ("cat", "concat") or len(node.inputs) < 2 or len(node.shape) < 3:
        return None
    if int(node.argument("dim", 1, 0)) % len(node.shape) != 1:
        return None
    inputs, first = [], 0
    for source in node.inputs:
        inputs.append(FusionInput(source, last_resize(source), (first, first + source.shape[1])))
        first += source.shape[1]
    return Fusion(node, "concat", tuple(inputs), _next_weight(node))


def _next_weight(node: Node) -> Node | None:
    while node.users:
        node = node.users[0]
        if node.kind is Kind.WEIGHT:
            return node
    return None


def _heads_after(pool: Node) -> list[Head]:
    """Every chain from `pool` to an output of the model that passes a weight layer and joins nothing else."""
    heads = []
    pending: list[tuple[Node, ...]] = [(pool,)]
    while pending:
        chain = pending.pop()
        users = chain[-1].users
        if not users:
            classifier = max((i for i, node in enumerate(chain) if node.kind is Kind.WEIGHT), default=0)
            if classifier:
                heads.append(Head(pool, chain[1:classifier], chain[classifier]))
        pending.extend((*chain, user) for user in users if len(user.inputs) == 1)
    return heads


def _is_attention(softmax: Node) -> bool:
    pending, seen = [softmax], {softmax}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.kind is Kind.MATMUL and len(user.inputs) > 1:
                return True
            if user.kind in (*PASSING, Kind.MUL, Kind.ADD) and user not in seen:
                seen.add(user)
                pending.append(user)
    return False
