"""Biases that the norm right behind them takes away again."""

from __future__ import annotations

__all__ = ["BiasBeforeNorm", "find_biases_before_norms"]

from dataclasses import dataclass

from torch import nn

from pl_normkit.graph import Kind, ModelGraph, Node

_PASSING = frozenset(("contiguous", "clone", "detach", "alias", "to", "_to_copy"))


@dataclass(frozen=True)
class BiasBeforeNorm:
    """A trainable bias, the layer that adds it, and the line of the norm that subtracts its mean again."""

    parameter: str
    layer: str
    norm: str
    source: str


def find_biases_before_norms(model: nn.Module, graph: ModelGraph) -> list[BiasBeforeNorm]:
    """Biases of convolutions and linear layers whose only user is a batch or instance norm over the same channels.

    A layer norm over the features keeps what the bias changes between them, and a group norm over several channels too.
    """
    parameters = dict(model.named_parameters())
    found = []
    for norm in graph.norms:
        node = norm.node
        layer = _only_source(node)
        if norm.kind not in ("batch", "instance") or layer is None or layer.kind is not Kind.WEIGHT or not _uses_batch(node):
            continue
        for read in layer.reads:
            parameter = parameters.get(read.parameter)
            if read.path[-1].argument == "bias" and parameter is not None and parameter.requires_grad and len(read.path) == 1:
                found.append(BiasBeforeNorm(read.parameter, layer.module, node.module, node.source))
    return found


def _only_source(node: Node) -> Node | None:
    while len(node.inputs) == 1 and len(node.inputs[0].users) == 1:
        node = node.inputs[0]
        if node.op not in _PASSING:
            return node
    return None


def _uses_batch(node: Node) -> bool:
    return node.op != "batch_norm" or bool(node.argument("training", 5, True))
