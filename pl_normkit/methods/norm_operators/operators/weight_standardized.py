"""Weight standardization: timm's convolution, whose filters have mean 0 and variance 1, in front of norms."""

from __future__ import annotations

__all__ = ["OPERATOR"]

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pl_normkit.graph import Kind, ModelGraph, Node
from pl_normkit.importing import import_library
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator, Place

FEWEST_WEIGHTS = 8
"""Weights of a filter below which their variance says little (derived)."""


def _places(model: nn.Module, graph: ModelGraph | None) -> Iterator[Place]:
    assert graph is not None
    norms = {norm.node for norm in graph.norms}
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in ("conv2d", "convolution"):
            calls.setdefault(node.module, []).append(node)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            yield Place(path, _why_not(path, module, calls.get(path, []), norms))


def _why_not(path: str, conv: nn.Conv2d, calls: list[Node], norms: set[Node]) -> str:
    if type(conv) is not nn.Conv2d or hasattr(conv, "parametrizations"):
        return f"{type(conv).__name__} may do more than a convolution"
    if conv._forward_hooks or conv._forward_pre_hooks or not path:
        return "it has hooks, or is the model itself"
    if conv.padding_mode != "zeros":
        return "timm's convolution pads with zeros only"
    if conv.weight[0].numel() < FEWEST_WEIGHTS:
        return f"its filters have {conv.weight[0].numel()} weights"
    if not calls or any(not _leads_to_norm(node, norms) for node in calls):
        return "no norm follows it at once, so that its outputs would be rescaled"
    return ""


def _leads_to_norm(node: Node, norms: set[Node]) -> bool:
    """Whether all that reads `node`, through views, is a norm."""
    if node in norms:
        return True
    return bool(node.users) and all(user in norms or (user.kind is Kind.VIEW and _leads_to_norm(user, norms)) for user in node.users)


def _make(old: OldNorm, options: Mapping[str, Any]) -> Any:
    conv = old.module
    assert isinstance(conv, nn.Conv2d)
    layers = import_library("timm.layers", "timm")
    new: Any = layers.StdConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias=conv.bias is not None,
        eps=options["eps"],
        device="meta",
    )
    new.weight, new.bias = old.weight, old.bias
    return new


OPERATOR = Operator(
    name="weight_standardized",
    formula="convolution with (W - mean) / sqrt(var + eps) over each filter",
    source="Weight Standardization, arXiv 1903.10520; timm's StdConv2d and its eps",
    replaces="convolutions that a norm reads at once",
    places=_places,
    make=_make,
    kept="no; behind a batch norm's training statistics only eps and the mean of the filter tell the two apart",
    when="group norm with a few samples per device; weight decay on these filters changes the step length, not the function",
    options={"eps": 1e-6},
    needs="the traced model; timm",
    reads_graph=True,
)
