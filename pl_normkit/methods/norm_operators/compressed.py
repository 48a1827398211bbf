"""`to_crmsnorm`: layer norms to RMS norms of a residual stream with one channel less, which compute the same."""

from __future__ import annotations

__all__ = ["to_crmsnorm"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import EditError, NormkitError
from pl_normkit.graph import ModelGraph, Node
from pl_normkit.methods.norm_operators.find import Stream, Writer
from pl_normkit.methods.norm_operators.fold import Affine, folded_values, read_affine
from pl_normkit.methods.norm_operators.last_dim import Layer, readers_by_parameter
from pl_normkit.methods.norm_operators.modules import CompressedRMSNorm, RecentreAndDrop
from pl_normkit.methods.norm_operators.rms_conversion import RECENTRE, centred_values, convertible_streams, width_and_eps
from pl_normkit.methods.norm_operators.weights import convert_checked, refuse_sharded
from pl_normkit.surgery import Changes, Edit, Insert, Replace, SetAttributes, get_module
from pl_normkit.values import Resize
from pl_normkit.wrappers import unwrapped

_SIZES = {"Linear": ("out_features", "in_features"), "Conv1D": ("nf", "nx")}
"""Attributes that repeat the number of outputs and of inputs, by class."""


def to_crmsnorm(model: nn.Module, example_inputs: Any) -> Changes:
    """Turn a Pre-LN model into a Pre-CRMSNorm model with the same function in eval mode, for inference.

    As `to_rmsnorm`, with the same conditions and refusals; the rows of the residual stream then sum to zero, so their last value is left
    out of it. The layers that write to the stream lose their last output. The layers that read a norm lose an input, `W <- W[:, :-1] -
    W[:, -1:]`, once its scale and shift are folded into them as by `fold_norms`; a norm that cannot be folded (a tied head, packed weights
    of attention) gives the missing value back and keeps its scale and shift, as all norms do in a model whose code does not run otherwise.

    The width becomes odd, which kernels like less: measure, and prefer `to_rmsnorm` unless this is faster (docs/norm_operators.md).

    Args:
        model: edited in place. Parameters stay the same objects under the same names, some with another shape; scales and shifts that
            are folded go. Load the checkpoint before.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for `audit`; the model is run on them before
            and after, and left as it was where the outputs differ.

    Raises:
        NothingMatchedError: when no layer norm can be converted; its evidence lists the reasons.
        EditError: for weights that are sharded or on the meta device, and where the model's code needs rows of the full width.
        TraceError: when `torch.export` cannot read the model. The model is untouched in each case.

    Source: "Pre-RMSNorm and Pre-CRMSNorm Transformers", arXiv 2305.14858 (code): formula, writers and readers. It drops the last column of
    the embeddings; dropping it in the first block instead, and norms that give it back, are ours.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    >>> x = torch.randn(5, 4)
    >>> before = model(x)
    >>> changes = to_crmsnorm(model, x)
    >>> tuple(model[0].weight.shape), tuple(model[2].weight.shape), torch.allclose(model(x), before, atol=1e-5)
    ((7, 4), (2, 7), True)
    """
    model = unwrapped(model)
    refuse_sharded(model)
    graph = ModelGraph.from_model(model, example_inputs, training=False)
    streams, skipped = convertible_streams(model, graph)
    affines = _narrow_norms(model, graph, [stream for stream, _ in streams])
    failure: Exception | None = None
    for chosen in (affines, {}) if affines else ({},):
        edits = [edit for stream, hosts in streams for edit in _edits(model, stream, hosts, chosen)]
        try:
            return convert_checked(model, example_inputs, edits, skipped)
        except NormkitError:
            raise
        except Exception as error:  # whatever the model's code raises for rows of another width
            failure = error
    raise EditError("the model's code needs rows of the full width", evidence=str(failure), fix="use to_rmsnorm") from failure


def _narrow_norms(model: nn.Module, graph: ModelGraph, streams: list[Stream]) -> dict[str, Affine]:
    """Norms whose readers can lose an input, by path, with these readers."""
    readers = readers_by_parameter(graph)
    written = {writer.layer.weight for stream in streams for writer in stream.writers.values()}
    inside = {node for stream in streams for node in stream.norms}
    found: dict[str, Affine] = {}
    for norm in graph.norms:
        if norm.node not in inside or sum(node.module == norm.module for node in inside) > 1:
            continue
        affine = read_affine(norm, readers)
        if isinstance(affine, str) or any(layer.weight in written or not _sizes(model, layer) for layer in affine.layers):
            continue
        found[norm.module] = affine
    return found


def _sizes(model: nn.Module, layer: Layer) -> tuple[str, str] | None:
    """The attributes of the layer's module that repeat its sizes; None where it is no linear layer on its own."""
    path, _, name = layer.weight.rpartition(".")
    module = get_module(model, path)
    kind = "Linear" if isinstance(module, nn.Linear) else type(module).__name__
    return _SIZES.get(kind) if name == "weight" and layer.node.module == path else None


def _edits(model: nn.Module, stream: Stream, hosts: list[tuple[str, bool]], affines: dict[str, Affine]) -> Iterator[Edit]:
    for writer in {writer.layer.weight: writer for writer in stream.writers.values()}.values():
        yield from _shorter(model, writer)
    for path, is_before in dict.fromkeys(hosts):
        what = "the residual stream is recentred where it starts, its last channel left out"
        yield Insert(path, RECENTRE, RecentreAndDrop(), what, "before" if is_before else "after")
    for node in {node.module: node for node in stream.norms}.values():
        yield from _norm_edits(model, node, affines.get(node.module))


def _shorter(model: nn.Module, writer: Writer) -> Iterator[Edit]:
    """The edits that take the mean over its outputs, and then the last of them, away from a layer and its LayerScale."""
    layer = writer.layer
    values: dict[str, Tensor] = {}
    for name, value in centred_values(model, writer).items():
        dim = layer.outputs if name == layer.weight else 0
        values[name] = value.narrow(dim, 0, value.shape[dim] - 1)
    yield Resize(layer.node.module, values, f"outputs of {layer.weight} centred, the last left out")
    yield from _said_size(model, layer, 0, values[layer.weight].shape[layer.outputs])


def _said_size(model: nn.Module, layer: Layer, which: int, size: int) -> Iterator[Edit]:
    """Let the layer's module say its new number of outputs (`which` 0) or inputs (1), where it keeps one."""
    path = layer.weight.rpartition(".")[0]
    module = get_module(model, path)
    names = _SIZES["Linear"] if isinstance(module, nn.Linear) else _SIZES.get(type(module).__name__)
    if names is not None and hasattr(module, names[which]):
        yield SetAttributes(path, {names[which]: size}, f"{names[which]} {size}")


def _norm_edits(model: nn.Module, node: Node, affine: Affine | None) -> Iterator[Edit]:
    old = get_module(model, node.module)
    (width, eps), gone = width_and_eps(node), ("weight", "bias") if affine is not None else ()
    if affine is None:
        new = CompressedRMSNorm(width, eps, old._parameters.get("weight"), old._parameters.get("bias"), whole=True)
    else:
        new = CompressedRMSNorm(width, eps)
        for layer in {layer.weight: layer for layer in affine.layers}.values():
            yield from _fewer_inputs(model, layer, affine, width)
    yield Replace(node.module, new, "CRMSNorm in place of layer norm", gone)


@torch.no_grad()
def _fewer_inputs(model: nn.Module, layer: Layer, affine: Affine, width: int) -> Iterator[Edit]:
    device = model.get_parameter(layer.weight).device
    gamma = model.get_parameter(affine.gamma).double() if affine.gamma else torch.ones(width, dtype=torch.float64, device=device)
    values = folded_values(model, [layer], gamma, model.get_parameter(affine.beta).double() if affine.beta else None)
    weight, inputs = values[layer.weight], 1 - layer.outputs
    last = weight.shape[inputs] - 1
    values[layer.weight] = weight.narrow(inputs, 0, last) - weight.narrow(inputs, last, 1)
    yield Resize(layer.node.module, values, f"{layer.weight} reads one channel less, scale and shift folded in")
    yield from _said_size(model, layer, 1, last)
