"""Products that are added in one call (`torch.addmm(x, a, b)`), as two: readers of a graph look for sums in one place."""

from __future__ import annotations

__all__ = ["split_products"]

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

_aten = torch.ops.aten
_PARTS: dict[Any, tuple[Any, Any]] = {
    _aten.addmm.default: (_aten.mm.default, _aten.add.Tensor),
    _aten.addmm_.default: (_aten.mm.default, _aten.add_.Tensor),
    _aten.baddbmm.default: (_aten.bmm.default, _aten.add.Tensor),
    _aten.baddbmm_.default: (_aten.bmm.default, _aten.add_.Tensor),
}


def split_products(program: GraphModule) -> None:
    """Turns each product that is added to a value of its own size into a product and a sum, in place.

    One that is added to less, a bias, stays: it is a linear layer.
    """
    for body in program.modules():
        if isinstance(body, GraphModule):
            for call in list(body.graph.nodes):
                if call.target in _PARTS and _adds_to_its_size(call):
                    _split(body.graph, call)


def _adds_to_its_size(call: Node) -> bool:
    summand = call.args[0]
    keeps_summand = bool(call.kwargs.get("beta", 1) != 0)
    return keeps_summand and isinstance(summand, Node) and _size(summand) == _size(call)


def _size(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _split(graph: Graph, call: Node) -> None:
    product_of, sum_of = _PARTS[call.target]
    summand, *factors = call.args
    with graph.inserting_before(call):
        product = _call(graph, call, product_of, *factors)
        if (alpha := call.kwargs.get("alpha", 1)) != 1:
            product = _call(graph, call, _aten.mul.Tensor, product, alpha)
        if (beta := call.kwargs.get("beta", 1)) != 1:
            scale = _aten.mul_.Tensor if sum_of is _aten.add_.Tensor else _aten.mul.Tensor
            summand = _call(graph, call, scale, summand, beta)
        total = _call(graph, call, sum_of, summand, product)
    call.replace_all_uses_with(total)
    graph.erase_node(call)


def _call(graph: Graph, like: Node, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node
