"""`ModelGraph`: the traced model in the words rules use."""

from __future__ import annotations

__all__ = ["ModelGraph"]

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.sharing import store_in_use
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
    walk_from,
)
from pl_normkit.graph.trace import trace
from pl_normkit.wrappers import unwrapped

_NORMS: dict[str, Literal["batch", "layer", "group", "instance", "rms"]] = {
    "batch_norm": "batch",
    "layer_norm": "layer",
    "native_layer_norm": "layer",
    "group_norm": "group",
    "instance_norm": "instance",
    "rms_norm": "rms",
}

_SLICES = frozenset(("slice", "select", "narrow", "getitem", "index_select"))
_ARITHMETIC = frozenset(("sub", "rsub", "div", "neg", "addcmul", "addcdiv", "lerp"))


@dataclass
class ModelGraph:
    """One forward pass of a model, as operations and as the structures they form.

    Attributes:
        nodes: the operations on activations in execution order.
    """

    nodes: list[Node]

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any, *, training: bool = True) -> ModelGraph:
        """Trace `model` in training mode; the model, its buffers, mode and every RNG stay as they are.

        Args:
            model: any module, also on the meta device. One that is compiled or wrapped for several devices is read through to the original.
            example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, nested containers allowed;
                a batch of one is repeated where a batch norm needs two samples.
            training: False traces it in eval mode.

        Raises:
            TraceError: when `torch.export` cannot read the model; the message names the line.
        """
        model = unwrapped(model)

        def make() -> ModelGraph:
            return cls(trace(model, example_inputs, training=training))

        store = store_in_use()
        return make() if store is None else store.graph(model, example_inputs, training, make)

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
        """Concatenations along channels and those sums of equally shaped values, added or stacked, that are no residual additions."""
        residual = {add.node for add in self.residual_adds}
        sums = [_sum_fusion(found) for found in self._sums if found.node not in residual and _joins_features(found)]
        concats = [fusion for node in self.nodes if (fusion := _concat_fusion(node)) is not None]
        stacked = [fusion for node in self.nodes if (fusion := _stacked_sum(node)) is not None]
        return sorted([*sums, *concats, *stacked], key=lambda fusion: fusion.node.index)

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
    name_at = {read.path[-1].argument: read.parameter for read in node.reads}
    return Norm(node, _NORMS[node.op], name_at.get("weight", ""), name_at.get("bias", ""))


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
    if found.split is not None:
        sides = [walk_branch(found.split, operand) for operand in found.operands]
        shortcut = min(sides, key=_shortcut_rank)
        add = _residual_of(found, found.split, shortcut, [side for side in sides if side is not shortcut])
        if add is not None:
            return add
    for operand in found.operands:
        others = [walk_from(operand, other) for other in found.operands if other is not operand]
        if all(other.nodes for other in others):
            return _residual_of(found, operand, Branch(operand, operand, ()), others)
    return None


def _residual_of(found: Sum, split: Node, shortcut: Branch, branches: list[Branch]) -> ResidualAdd | None:
    """The residual addition these sides make, None where they join levels, are equals, or a side only rescales the split."""
    if not _is_plain(shortcut) or any(_changes_resolution_back(side) for side in (shortcut, *branches)):
        return None
    if any(_shortcut_rank(branch) <= _shortcut_rank(shortcut) or _only_rescales(branch) for branch in branches):
        return None
    if all(_reads_other_part(shortcut, branch) for branch in branches):
        return None
    return ResidualAdd(found.node, split, shortcut, tuple(branches), "projection" if shortcut.of_kind(Kind.WEIGHT) else "identity")


def _is_plain(shortcut: Branch) -> bool:
    """Linear, with at most one weight layer (or a depthwise and a pointwise one), which a pre-activation of its own may precede."""
    weights = shortcut.of_kind(Kind.WEIGHT)
    is_separable = len(weights) == 2 and "conv" in weights[0].op and weights[0].argument("groups", 6, 1) > 1
    bends = shortcut.of_kind(Kind.ACTIVATION, Kind.ATTENTION, Kind.SOFTMAX)
    return (len(weights) <= 1 or is_separable) and all(
        weights and node.kind is Kind.ACTIVATION and node.index < weights[0].index for node in bends
    )


def _reads_other_part(shortcut: Branch, branch: Branch) -> bool:
    """Whether the two start from different slices of the split (Res2Net's hierarchy, cascaded heads): they share no value."""
    starts = [{node for node in side.nodes if side.split in node.inputs} for side in (shortcut, branch)]
    return all(start and all(node.op in _SLICES for node in start) for start in starts) and not starts[0] & starts[1]


def _only_rescales(branch: Branch) -> bool:
    """Whether a side is arithmetic on the split alone, as in rotary embeddings and response normalization."""
    return all(node.kind in (*PASSING, Kind.MUL, Kind.ADD, Kind.CAT) or node.op in _ARITHMETIC for node in branch.nodes)


def _shortcut_rank(side: Branch) -> tuple[int, int, int]:
    """Sorts the sides of an addition: the fewer weights, non-linearities and operations, the more it is a shortcut."""
    nonlinear = len(side.of_kind(Kind.ACTIVATION, Kind.ATTENTION, Kind.SOFTMAX))
    others = sum(node.kind not in PASSING and node.kind not in (Kind.WEIGHT, Kind.ACTIVATION) for node in side.nodes)
    return (len(side.of_kind(Kind.WEIGHT)), nonlinear, others)


def _changes_resolution_back(side: Branch) -> bool:
    """A side that was resized joins levels (a decoder's long skip): that is a fusion, not a residual branch."""
    return any(node.kind is Kind.RESIZE or node.is_transposed_convolution for node in side.nodes)


def _joins_features(found: Sum) -> bool:
    """Whether two operands or more fill the sum, and it is neither an attention score nor arithmetic on one value.

    A broadcast shift (a condition, a position) fuses nothing.
    """
    if sum(operand.shape == found.node.shape for operand in found.operands) < 2 or _feeds_attention(found.node):
        return False
    sides = [walk_branch(found.split, operand) for operand in found.operands] if found.split is not None else []
    return not sides or not all(_only_rescales(side) for side in sides)


def _sum_fusion(found: Sum) -> Fusion:
    inputs = tuple(FusionInput(operand, last_resize(operand), None) for operand in found.operands)
    return Fusion(found.node, "sum", inputs, _next_weight(found.node))


def _stacked_sum(node: Node) -> Fusion | None:
    """`torch.stack(levels).sum(0)`."""
    if node.op != "sum" or len(node.inputs) != 1 or node.inputs[0].op != "stack" or node.inputs[0].users != [node]:
        return None
    stack = node.inputs[0]
    dims = node.argument("dim", 1, None)
    dims = [dims] if isinstance(dims, int) else dims
    if len(stack.inputs) < 2 or len(node.shape) < 3 or not dims or len(dims) != 1:
        return None
    if dims[0] % len(stack.shape) != int(stack.argument("dim", 1, 0)) % len(stack.shape):
        return None
    inputs = tuple(FusionInput(operand, last_resize(operand), None) for operand in stack.inputs)
    return Fusion(node, "sum", inputs, _next_weight(node))


def _concat_fusion(node: Node) -> Fusion | None:
    if node.op not in ("cat", "concat") or len(node.inputs) < 2 or len(node.shape) < 3:
        return None
    consumer = _next_weight(node)
    if int(node.argument("dim", 1, 0)) % len(node.shape) != 1 or (len(node.shape) == 3 and not _is_convolution(consumer)):
        return None
    inputs, first = [], 0
    for source in node.inputs:
        inputs.append(FusionInput(source, last_resize(source), (first, first + source.shape[1])))
        first += source.shape[1]
    return Fusion(node, "concat", tuple(inputs), consumer)


def _is_convolution(node: Node | None) -> bool:
    """Of (N, L, D) tokens and (N, C, L) signals only the latter, which a convolution reads, have their channels second."""
    return node is not None and "conv" in node.op


def _next_weight(node: Node) -> Node | None:
    while node.users:
        node = node.users[0]
        if node.kind is Kind.WEIGHT:
            return node
    return None


def _heads_after(pool: Node) -> list[Head]:
    """Every chain from `pool` to an output of the model that passes a weight layer and joins only chains from the same pool."""
    heads = []
    pending: list[tuple[Node, ...]] = [(pool,)]
    seen: set[tuple[Node, int]] = set()
    while pending:
        chain = pending.pop()
        classifier = max((i for i, node in enumerate(chain) if node.kind is Kind.WEIGHT), default=0)
        if (chain[-1], chain[classifier].index) in seen:
            continue
        seen.add((chain[-1], chain[classifier].index))
        if not chain[-1].users and classifier:
            heads.append(Head(pool, chain[1:classifier], chain[classifier]))
        pending.extend((*chain, user) for user in chain[-1].users if len(user.inputs) == 1 or _averages_logits(user, pool))
    return heads


def _averages_logits(node: Node, pool: Node) -> bool:
    """Whether `node` adds values that all come from `pool` alone (a classifier and a distilled one)."""
    pending = [*node.inputs] if node.kind is Kind.ADD else []
    if not pending:
        return False
    for source in pending:
        if source.index < pool.index or not source.inputs:
            return False
        pending.extend(before for before in source.inputs if before is not pool and before not in pending)
    return True


def _is_attention(softmax: Node) -> bool:
    return any(user.kind is Kind.MATMUL and len(user.inputs) > 1 for score in _scores_from(softmax) for user in score.users)


def _feeds_attention(node: Node) -> bool:
    """Whether `node` is an attention score, or a bias added to it."""
    return any(user.kind is Kind.SOFTMAX and _is_attention(user) for score in _scores_from(node) for user in score.users)


def _scores_from(start: Node) -> list[Node]:
    """`start` and what scaling, masking, reshaping, dropping or mixing heads makes of it."""
    scores = [start]
    for node in scores:
        for user in node.users:
            mixes_heads = user.kind is Kind.WEIGHT and user.shape == node.shape
            passes = user.kind in (*PASSING, Kind.MUL, Kind.ADD) or user.op in ("div", "masked_fill") or mixes_heads
            if passes and user not in scores:
                scores.append(user)
    return scores
