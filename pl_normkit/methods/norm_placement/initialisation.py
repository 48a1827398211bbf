"""What placements ask of the weights before training: scales by depth."""

from __future__ import annotations

__all__ = ["attention_weights", "deepnorm_constants", "depth_values", "is_trained", "xavier_values"]

import math

import torch
from torch import Tensor, nn

from pl_normkit.errors import EditError
from pl_normkit.graph import Kind, ModelGraph, Node
from pl_normkit.methods.norm_placement.find import Layout, Site

Constants = tuple[float, float]
_STEPS = 24


def deepnorm_constants(encoder_layers: int, decoder_layers: int) -> tuple[Constants, Constants]:
    """(alpha, beta) of the encoder and of the decoder: x <- norm(alpha x + f(x)), weights of v, output, fc1 and fc2 scaled by beta.

    One of the two counts is 0 for a stack of one kind. Alpha grows with depth and beta falls.

    Source: DeepNet (arXiv 2203.00555); as in its authors' code, microsoft/torchscale, but for the encoder's 0.87 beside a decoder: that
    code uses 1 / 0.87 = 1.15. We take 0.87 for the paper's constant, which we have not read there.

    >>> [round(constant, 3) for constant in deepnorm_constants(12, 0)[0]]
    [2.213, 0.319]
    """
    n, m = encoder_layers, decoder_layers
    if not m:
        return ((2 * n) ** 0.25, (8 * n) ** -0.25), (1.0, 1.0)
    if not n:
        return (1.0, 1.0), ((2 * m) ** 0.25, (8 * m) ** -0.25)
    mixed = (n**4 * m) ** (1 / 16)
    return (0.81 * mixed, 0.87 / mixed), ((3 * m) ** 0.25, (12 * m) ** -0.25)


def is_trained(model: nn.Module, graph: ModelGraph) -> str:
    """The name of a scale or shift of a norm whose values differ from one another, as after training; "" without one."""
    known = dict(model.named_parameters())
    for norm in graph.norms:
        for name in filter(None, (norm.gamma, norm.beta)):
            parameter = known.get(name)
            if (
                parameter is not None
                and not parameter.is_meta
                and parameter.numel() > 1
                and bool((parameter != parameter.flatten()[0]).any())
            ):
                return name
    return ""


@torch.no_grad()
def depth_values(layout: Layout, last: Node, factor: float) -> dict[str, Tensor]:
    """The weights of a last layer times a factor. Shifts stay."""
    name = layout.weight_name(last)
    return {name: layout.model.get_parameter(name) * factor}


@torch.no_grad()
def xavier_values(layout: Layout, site: Site, beta: float) -> dict[str, Tensor]:
    """The weights of a branch with the standard deviation of Xavier's initialisation: gain 1 for queries and keys, else `beta`.

    Raises EditError where one layer makes queries, keys and values, and it is not known which of its rows are which.
    """
    values: dict[str, Tensor] = {}
    asking, giving = attention_weights(site)
    for node in site.weights:
        name = layout.weight_name(node)
        weight = layout.model.get_parameter(name)
        if node in asking and node in giving:
            values[name] = _fused(layout, node, weight, beta)
        else:
            values[name] = _scaled(weight, 1.0 if node in asking else beta)
    return values


def _fused(layout: Layout, node: Node, weight: Tensor, beta: float) -> Tensor:
    if not isinstance(layout.model.get_submodule(node.module), nn.MultiheadAttention):
        raise EditError(
            "one layer makes queries, keys and values, and it is not known which of its rows make values, whose scale is another",
            where=node.module,
            fix="give the block a layer for each, or nn.MultiheadAttention",
        )
    query, key, value = weight.chunk(3)
    return torch.cat([_scaled(query, 1.0), _scaled(key, 1.0), _scaled(value, beta)])


def _scaled(weight: Tensor, gain: float) -> Tensor:
    """As drawn, with Xavier's standard deviation: gain * sqrt(2 / (fan in + fan out))."""
    receptive = weight[0, 0].numel()
    fans = (weight.shape[0] + weight.shape[1]) * receptive
    spread = weight.double().square().mean().sqrt()
    return weight * (gain * math.sqrt(2 / fans) / spread).to(weight.dtype)


def attention_weights(site: Site) -> tuple[set[Node], set[Node]]:
    """Weight layers that make queries and keys, and those that make values."""
    for node in site.branch.nodes:
        if node.kind is Kind.ATTENTION and len(node.inputs) >= 3:
            query, key, value = node.inputs[:3]
            return _sources(site, query) | _sources(site, key), _sources(site, value)
        if node.kind is Kind.SOFTMAX:
            product = next((user for user in _through(node) if user.kind is Kind.MATMUL and len(user.inputs) > 1), None)
            if product is not None:
                scores = _sources(site, node)
                inside = {node, *_through(node)}
                return scores, {found for source in product.inputs if source not in inside for found in _sources(site, source)}
    return set(), set()


def _through(softmax: Node) -> list[Node]:
    """What follows a softmax by views, dropout and conversions, up to the first product."""
    found: list[Node] = []
    waiting = list(softmax.users)
    while waiting and len(found) < _STEPS:
        node = waiting.pop(0)
        found.append(node)
        if node.kind is not Kind.MATMUL:
            waiting += node.users
    return found


def _sources(site: Site, end: Node) -> set[Node]:
    """The weight layers of the branch that `end` comes from, without those before them."""
    found: set[Node] = set()
    seen, waiting = {end}, [end]
    while waiting:
        node = waiting.pop()
        if node.kind is Kind.WEIGHT:
            found.add(node)
            continue
        new = [source for source in node.inputs if source not in seen and source.index > site.branch.split.index]
        seen.update(new)
        waiting += new
    return found & set(site.weights)
