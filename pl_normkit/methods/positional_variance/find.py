"""Where a vision transformer adds its absolute positional embedding to the patch tokens, read from the trace."""

from __future__ import annotations

__all__ = ["PositionalSite", "added_positions", "find_site", "patch_variance", "trace_site"]

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError, TraceError
from pl_normkit.graph import Kind, ModelGraph, Node, placeholder_name
from pl_normkit.wrappers import unwrapped

_TOKENS = (nn.Conv2d, nn.Conv3d, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
_PASSING = (Kind.VIEW, Kind.DROPOUT)


@dataclass(frozen=True)
class PositionalSite:
    """The addition of one positional embedding P to patch tokens X.

    Attributes:
        parameter: name of the embedding.
        tokens: path of the module whose output is X: the patch projection, or the norm behind it.
        channel_dim: dimension of the channels in that output.
        images: path of the first weight layer, whose input is the normalised image; "" where that is no 2-D convolution.
        first: index of the first patch token among the tokens that P is added to.
        count: number of patch tokens.
        width: number of channels of a token.
        size: height and width of the image.
        grid: rows and columns of patch tokens, None where patches are cut by reshaping.
        is_resampled: whether the forward pass interpolates the embedding.
        is_normalised: whether X comes out of a norm over channels, which gives it the same variance whatever the image is.
        source: `file.py:line` of the addition.
        node: the addition in the trace.
    """

    parameter: str
    tokens: str
    channel_dim: int
    images: str
    first: int
    count: int
    width: int
    size: tuple[int, int]
    grid: tuple[int, int] | None
    is_resampled: bool
    is_normalised: bool
    source: str
    node: Node = field(repr=False, compare=False)


def find_site(model: nn.Module, graph: ModelGraph) -> PositionalSite:
    """The first addition of a position-wise parameter to tokens that come from image patches.

    Raises NothingMatchedError where there is none: no absolute positional embedding, or no patch embedding before it.
    """
    for node in graph.nodes:
        if node.kind is Kind.ATTENTION or node.kind is Kind.SOFTMAX:
            break
        site = _read_addition(model, graph, node)
        if site is not None:
            return site
    raise NothingMatchedError(
        "the model adds no absolute positional embedding to patch tokens",
        where=type(model).__name__,
        evidence="no learnable embedding over positions is added to the output of a patch projection before the first attention",
        fix="variance shift of positions concerns vision transformers with absolute positions (ViT, DeiT, BEiT with absolute positions)",
    )


def _read_addition(model: nn.Module, graph: ModelGraph, node: Node) -> PositionalSite | None:
    if node.kind is not Kind.ADD or len(node.inputs) != 1 or len(node.parameters) != 1 or len(node.shape) not in (3, 4):
        return None
    found = _patch_tokens(node.inputs[0])
    if found is None:
        return None
    source, first = found
    channels_first = "conv" in source.op or "batch" in source.op or "group" in source.op
    width = source.shape[1] if channels_first else source.shape[-1]
    positions = node.numel // max(node.shape[0] * width, 1)
    entering = node.reads[-1].path[-1].shape
    if width not in (node.shape[1], node.shape[-1]) or entering[-len(node.shape) + 1 :] != node.shape[1:] or positions < 2:
        return None
    if graph.calls[source.module, source.op] != 1 or not _is_output(model, graph, source):
        return None
    return PositionalSite(
        parameter=node.parameters[0],
        tokens=source.module,
        channel_dim=1 if channels_first else -1,
        images=_image_reader(model, graph, source),
        first=first,
        count=source.numel // (source.shape[0] * width),
        width=width,
        size=_image_size(graph),
        grid=_grid(source),
        is_resampled=_is_resampled(node, _grid(source)),
        is_normalised="layer_norm" in source.op or "rms_norm" in source.op,
        source=node.source,
        node=node,
    )


def _is_output(model: nn.Module, graph: ModelGraph, source: Node) -> bool:
    """Whether the value is what its module returns, so that a hook there sees it; norms of libraries count where they end with it."""
    module = model.get_submodule(source.module)
    is_known = isinstance(module, _TOKENS) or (source.kind is Kind.NORM and next(module.children(), None) is None)
    return is_known and [node for node in graph.nodes if node.module == source.module][-1] is source


def _patch_tokens(node: Node) -> tuple[Node, int] | None:
    """The operation whose value are the patch tokens inside `node`, and how many other tokens stand before them."""
    first = 0
    while True:
        if node.kind is Kind.CAT and len(node.inputs) == 1:
            first += _tokens_before(node)
        elif node.kind not in _PASSING or len(node.inputs) != 1:
            break
        node = node.inputs[0]
    projection = node
    while projection.kind in (Kind.NORM, *_PASSING) and len(projection.inputs) == 1:
        projection = projection.inputs[0]
    is_projection = projection.kind is Kind.WEIGHT and ("conv" in projection.op or projection.op in ("linear", "addmm"))
    return (node, first) if is_projection and node.kind in (Kind.WEIGHT, Kind.NORM) else None


def _tokens_before(cat: Node) -> int:
    """Tokens that a concatenation puts before the ones that come from the image (class, distillation, register tokens)."""
    before = 0
    parts = cat.target.args[0]
    for part in parts if isinstance(parts, (list, tuple)) else ():
        if part is cat.inputs[0].target:
            return before
        value = part.meta.get("val") if isinstance(part, torch.fx.Node) else None
        before += int(value.shape[1]) if isinstance(value, Tensor) and value.dim() > 1 else 0
    return before


def _grid(source: Node) -> tuple[int, int] | None:
    while source.kind is not Kind.WEIGHT and source.inputs:
        source = source.inputs[0]
    return (source.shape[2], source.shape[3]) if "conv2d" in source.op and len(source.shape) == 4 else None


def _is_resampled(node: Node, grid: tuple[int, int] | None) -> bool:
    """Whether an interpolation to another size stands between the parameter and the addition; exports keep those to the same size."""
    steps = [step for read in node.reads for step in read.path if step.op.lstrip("_").startswith(("upsample", "grid_sampler"))]
    return any(len(step.shape) != 4 or step.shape[2:] != grid for step in steps)


def _image_size(graph: ModelGraph) -> tuple[int, int]:
    """Of the first value with two spatial dimensions: the image itself, as the model is called."""
    shape = next((node.shape for node in graph.nodes if len(node.shape) == 4), (1, 1, 1, 1))
    return shape[2], shape[3]


def _image_reader(model: nn.Module, graph: ModelGraph, source: Node) -> str:
    """Path of the first weight layer: what it reads is the image after all normalization, also that inside the model."""
    first = next(node for node in graph.nodes if node.kind is Kind.WEIGHT)
    is_before = first is source or source in graph.downstream(first)
    return first.module if is_before and isinstance(model.get_submodule(first.module), nn.Conv2d) else ""


def trace_site(model: nn.Module, inputs: Any) -> PositionalSite:
    """Trace `model` and find its site. Raises TraceError or NothingMatchedError."""
    original = unwrapped(model)
    return find_site(original, ModelGraph.from_model(original, inputs))


def added_positions(model: nn.Module, site: PositionalSite, positions: Tensor | None = None) -> Tensor:
    """What the addition adds, (L, D): the embedding as the forward pass selects and resamples it.

    Args:
        model: the traced model.
        site: as found in its trace; the result has the resolution of that trace.
        positions: a tensor in place of the embedding, of its shape; differentiable.

    Raises TraceError where the embedding is computed from more than parameters and buffers.
    """
    operand = next(node for node in site.node.target.all_input_nodes if node is not site.node.inputs[0].target)
    named: dict[str, Tensor] = {}
    for prefix, tensors in _tensors_of(model):
        named |= {placeholder_name(prefix, name): tensor.detach() for name, tensor in tensors}
    if positions is not None:
        embedding = model.get_parameter(site.parameter)
        same = [name for name, value in named.items() if value.data_ptr() == embedding.data_ptr() and value.shape == embedding.shape]
        named |= dict.fromkeys(same, positions)
    added = _evaluate(operand, {}, named, site).reshape(site.node.shape[1:])
    return added.flatten(0, -2) if added.shape[-1] == site.width else added.flatten(1).T


def _tensors_of(model: nn.Module) -> Iterator[tuple[Literal["p", "b"], Iterable[tuple[str, Tensor]]]]:
    yield "p", model.named_parameters(remove_duplicate=False)
    yield "b", model.named_buffers(remove_duplicate=False)


def _evaluate(node: torch.fx.Node, known: dict[torch.fx.Node, Tensor], named: dict[str, Tensor], site: PositionalSite) -> Tensor:
    """The value of a node of the exported graph that depends on parameters and buffers alone."""
    if node in known:
        return known[node]
    if node.op == "placeholder" and node.name.lower() in named:
        return named[node.name.lower()]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        raise TraceError(
            "the value of the positional embedding cannot be computed from the trace",
            where=f"{site.parameter} at {site.source}",
            evidence=f"{node.op} {node.name}",
            fix="give the embedding as one parameter that the forward pass adds",
        )
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda arg: _evaluate(arg, known, named, site))
    known[node] = node.target(*args, **kwargs)
    return known[node]


def patch_variance(positions: Tensor) -> float:
    """Variance over channels per position (biased), mean over positions; (L, D)."""
    return float(positions.double().var(-1, correction=0).mean())
