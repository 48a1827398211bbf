"""`ModelGraph`: the traced model in the words rules use."""

from __future__ import annotations

__all__ = ["ModelGraph"]

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from pl_normkit.errors import TraceError
from pl_normkit.graph.attention import is_attention
from pl_normkit.graph.heads import find_heads
from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.norms import find_norms
from pl_normkit.graph.parts import read_partly
from pl_normkit.graph.paths import last_resize
from pl_normkit.graph.residual import as_residual, find_sums, joins_features
from pl_normkit.graph.sharing import store_in_use
from pl_normkit.graph.structure import Attention, Branch, Dropout, Fusion, FusionInput, Head, Norm, ResidualAdd
from pl_normkit.graph.sums import Sum
from pl_normkit.graph.trace import trace
from pl_normkit.wrappers import unwrapped


@dataclass
class ModelGraph:
    """One forward pass of a model, as operations and as the structures they form.

    Attributes:
        nodes: the operations on activations in execution order.
        unseen: what the reading leaves out, in words; "" where it is whole.
    """

    nodes: list[Node]
    unseen: str = ""

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any, *, training: bool = True, partly: bool = False) -> ModelGraph:
        """Trace `model` in training mode; the model, its buffers, mode and every RNG stay as they are.

        Args:
            model: any module, also on the meta device. One that is compiled or wrapped for several devices is read through to the original.
            example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, nested containers allowed;
                a batch of one is repeated where a batch norm needs two samples.
            training: False traces it in eval mode.
            partly: where the training graph cannot be exported, read the eval graph or, failing that, the parts that can be; `unseen`
                then says so.

        Raises:
            TraceError: when `torch.export` cannot read the model; the message names the line.
        """
        model = unwrapped(model)
        store = store_in_use()

        def whole() -> ModelGraph:
            return cls(trace(model, example_inputs, training=training))

        try:
            return whole() if store is None else store.graph(model, example_inputs, training, whole)
        except TraceError as error:
            read = read_partly(model, example_inputs) if partly else None
            if read is None:
                raise
            nodes, unseen = read
            return cls(nodes, f"{error}\n  so: {unseen}")

    @cached_property
    def calls(self) -> Counter[tuple[str, str]]:
        """How often each (module path, operation) runs in one forward pass; more than once for shared modules."""
        return Counter((node.module, node.op) for node in self.nodes)

    @cached_property
    def norms(self) -> list[Norm]:
        return find_norms(self.nodes)

    @cached_property
    def dropouts(self) -> list[Dropout]:
        return [Dropout(node, node.drop_probability, node.drops_channels) for node in self.nodes if node.kind is Kind.DROPOUT]

    @cached_property
    def pools(self) -> list[Node]:
        return [node for node in self.nodes if node.kind is Kind.POOL]

    @cached_property
    def resizes(self) -> list[Node]:
        return [node for node in self.nodes if node.kind is Kind.RESIZE or node.is_transposed_convolution]

    @cached_property
    def residual_adds(self) -> list[ResidualAdd]:
        """Additions of a shortcut and branches that start from one value, nested ones included, in execution order.

        `residual.as_residual` says which sums are such.
        """
        return [add for found in self._sums if (add := as_residual(found)) is not None]

    @cached_property
    def fusions(self) -> list[Fusion]:
        """Concatenations along channels and those sums of equally shaped values, added or stacked, that are no residual additions."""
        residual = {add.node for add in self.residual_adds}
        sums = [_sum_fusion(found) for found in self._sums if found.node not in residual and joins_features(found)]
        concats = [fusion for node in self.nodes if (fusion := _concat_fusion(node)) is not None]
        return sorted([*sums, *concats], key=lambda fusion: fusion.node.index)

    @cached_property
    def heads(self) -> list[Head]:
        return find_heads(self.nodes)

    @cached_property
    def attentions(self) -> list[Attention]:
        fused = [Attention(node, fused=True) for node in self.nodes if node.kind is Kind.ATTENTION]
        unfused = [Attention(node, fused=False) for node in self.nodes if node.kind is Kind.SOFTMAX and is_attention(node)]
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


def _sum_fusion(found: Sum) -> Fusion:
    inputs = tuple(FusionInput(operand, last_resize(operand), None) for operand in found.operands)
    return Fusion(found.node, "sum", inputs, _next_weight(found.node))


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
