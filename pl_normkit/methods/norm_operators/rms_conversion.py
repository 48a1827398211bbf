"""`to_rmsnorm`: layer norms to RMS norms that compute the same."""

from __future__ import annotations

__all__ = ["centred_values", "convertible_streams", "to_rmsnorm", "width_and_eps"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph import ModelGraph, Node
from pl_normkit.methods.norm_operators.find import Stream, Writer, find_streams
from pl_normkit.methods.norm_operators.modules import CentredOutputs, CentredOutputsOfConv1D, Recentre, ShiftedRMSNorm
from pl_normkit.methods.norm_operators.weights import convert_checked, refuse_sharded
from pl_normkit.surgery import Change, Changes, Edit, Insert, MixIn, Replace, get_module
from pl_normkit.values import SetValues
from pl_normkit.wrappers import unwrapped

RECENTRE = "recentre"
"""Name of the child that recentres the stream where it enters the first block."""


def to_rmsnorm(model: nn.Module, example_inputs: Any, *, for_training: bool = False) -> Changes:
    """Turn a Pre-LN model into a Pre-RMSNorm model with the same function: in eval mode, for inference, or for training too.

    A layer norm of rows with zero mean is an RMS norm. The layers that write to the residual stream are made to write such rows
    (`W <- W - mean of W over its outputs`, the bias alike, a LayerScale folded in first and set to 1), the embeddings are recentred by one
    operation where they enter the first block, and each layer norm becomes an RMS norm with the same gamma, beta and eps. Embeddings
    stay as they are, so a tied head stays right. The traced model must show that layer norms alone read the stream; a norm for which it
    does not is left alone, and `skipped` says why: a feature tap or a pooling without norm, a tied writer, a post-norm, gates that depend
    on the input. In training mode dropout with p > 0 on a branch would break the zero mean, and so would training on.

    With `for_training` the layers keep their weights and centre them anew in each forward pass, so that every step is that of the Pre-LN
    model and its checkpoints are exchangeable. To export, call `undo()` and convert once more without it. Dropout with p > 0 on a branch
    and LayerScales are refused then.

    Args:
        model: edited in place. gamma and beta stay the same parameter objects under the same keys; load the checkpoint before.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for `audit`; the model is run on them before
            and after, and left as it was where the outputs differ.
        for_training: convert for training, as above.

    Raises:
        NothingMatchedError: when no layer norm can be converted; its evidence lists the reasons.
        EditError: for weights that are sharded or on the meta device.
        TraceError: when `torch.export` cannot read the model. The model is untouched in each case.

    Source: "Pre-RMSNorm and Pre-CRMSNorm Transformers", arXiv 2305.14858 (code), which centres the embeddings too; recentring them in the
    first block instead is ours. Whether it is faster depends on the kernels at hand: measure, or see docs/norm_operators.md.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    >>> x = torch.randn(5, 4)
    >>> before = model(x)
    >>> changes = to_rmsnorm(model, x)
    >>> type(model[1]).__name__, torch.allclose(model(x), before, atol=1e-5)
    ('ShiftedRMSNorm', True)
    """
    model = unwrapped(model)
    refuse_sharded(model)
    graph = ModelGraph.from_model(model, example_inputs, training=for_training)
    streams, skipped = convertible_streams(model, graph, for_training=for_training)
    edits = [edit for stream, hosts in streams for edit in _edits(model, stream, hosts, for_training)]
    return convert_checked(model, example_inputs, edits, skipped)


def convertible_streams(
    model: nn.Module, graph: ModelGraph, *, for_training: bool = False
) -> tuple[list[tuple[Stream, list[tuple[str, bool]]]], list[Change]]:
    """Streams that can be centred, each with the modules where it is recentred, and what is left alone. Raises NothingMatchedError."""
    found: list[tuple[Stream, list[tuple[str, bool]]]] = []
    skipped: list[Change] = []
    for stream in find_streams(graph):
        hosts = [_host(graph, base) for base in stream.bases]
        reason = stream.reason or _why_not(model, graph, stream, hosts)
        if not reason and for_training:
            reason = next(filter(None, (_why_not_trained(model, writer) for writer in stream.writers.values())), "")
        if reason:
            skipped += [Change(path, reason) for path in dict.fromkeys(norm.module for norm in stream.norms)]
        else:
            found.append((stream, hosts))
    if not found:
        raise NothingMatchedError("no layer norm can be converted", evidence="; ".join(map(str, skipped)))
    return found, skipped


def _host(graph: ModelGraph, base: Node) -> tuple[str, bool]:
    """The module that takes `base`, and whether it is recentred before that module (else after the module that makes it); "" for none."""
    paths = [user.module.split(".") for user in base.users]
    common = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    if common and common[0]:
        return ".".join(common), True
    made_last = max((node.index for node in graph.nodes if node.module == base.module), default=-1) == base.index
    return (base.module, False) if base.module and made_last else ("", True)


def _why_not(model: nn.Module, graph: ModelGraph, stream: Stream, hosts: Sequence[tuple[str, bool]]) -> str:
    if any(not path for path, _ in hosts):
        return "no module takes the embeddings, where they could be recentred"
    for norm in stream.norms:
        module = get_module(model, norm.module)
        if any(module.children()) or any(node.module == norm.module and node.op != norm.op for node in graph.nodes):
            return f"{norm.module or 'the model'} does more than a layer norm"
        if not {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
            return f"{norm.module} calls its scale and shift something else than weight and bias"
        if any(node.module == norm.module and node not in stream.norms for node in graph.nodes):
            return f"{norm.module} normalizes other values too"
        if len(norm.argument("normalized_shape", 1, ())) != 1 or not norm.module:
            return "it normalizes over more than the last dimension, or is the model itself"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{norm.module} has hooks"
        held = {id(parameter) for parameter in module.parameters()}
        if {id(model.get_parameter(name)) for name in norm.parameters} != held:
            return f"{norm.module} does not read its parameters as they are stored"
    return ""


def _why_not_trained(model: nn.Module, writer: Writer) -> str:
    if writer.factor:
        return f"{writer.factor}, a LayerScale, would have to be centred with the layer in front of it in each step"
    return "" if _mixin(model, writer) else f"{writer.layer.weight} is not the weight of a plain linear layer"


def _mixin(model: nn.Module, writer: Writer) -> type[nn.Module] | None:
    """What centres the outputs of the writer's module in each forward pass."""
    path, _, name = writer.layer.weight.rpartition(".")
    module = get_module(model, path)
    if name != "weight" or writer.layer.node.module != path:
        return None
    if type(module).forward is nn.Linear.forward:
        return CentredOutputs
    return CentredOutputsOfConv1D if type(module).__name__ == "Conv1D" and writer.layer.outputs == 1 else None


def _edits(model: nn.Module, stream: Stream, hosts: Sequence[tuple[str, bool]], for_training: bool) -> list[Edit]:
    writers = {writer.layer.weight: writer for writer in stream.writers.values()}.values()
    edits: list[Edit] = [_centred_anew(model, writer) if for_training else _centred(model, writer) for writer in writers]
    for path, is_before in dict.fromkeys(hosts):
        what = "the residual stream is recentred where it starts"
        edits.append(Insert(path, RECENTRE, Recentre(), what, "before" if is_before else "after"))
    for norm in {node.module: node for node in stream.norms}.values():
        edits.append(Replace(norm.module, _rms_norm(get_module(model, norm.module), norm), "RMS norm in place of layer norm"))
    return edits


def width_and_eps(norm: Node) -> tuple[int, float]:
    """What a layer norm was called with."""
    (width,) = norm.argument("normalized_shape", 1, ())
    return int(width), float(norm.argument("eps", 4, 1e-5))


def _rms_norm(old: nn.Module, norm: Node) -> nn.RMSNorm:
    width, eps = width_and_eps(norm)
    weight, bias = old._parameters.get("weight"), old._parameters.get("bias")
    if weight is None:
        return nn.RMSNorm(width, eps=eps, elementwise_affine=False)
    new: nn.RMSNorm
    if bias is None:
        new = nn.RMSNorm(width, eps=eps, device="meta")
    else:
        new = ShiftedRMSNorm(width, eps, device="meta")
        new.bias = bias
    new.weight = weight
    return new


def _centred_anew(model: nn.Module, writer: Writer) -> MixIn:
    mixin = _mixin(model, writer)
    assert mixin is not None  # else the stream is left alone
    return MixIn(writer.layer.node.module, mixin, f"outputs of {writer.layer.weight} centred in each forward pass")


def _centred(model: nn.Module, writer: Writer) -> SetValues:
    scale = f", {writer.factor} folded in" if writer.factor else ""
    return SetValues(writer.layer.node.module, centred_values(model, writer), f"outputs of {writer.layer.weight} centred{scale}")


@torch.no_grad()
def centred_values(model: nn.Module, writer: Writer) -> dict[str, Tensor]:
    """New values, by name, with which a layer and its LayerScale write what they wrote without its mean over the outputs."""
    layer = writer.layer
    weight = model.get_parameter(layer.weight).double()
    factor = model.get_parameter(writer.factor).double() if writer.factor else weight.new_ones(())
    scaled = weight * (factor.view(-1, 1) if writer.factor and layer.outputs == 0 else factor)
    values: dict[str, Tensor] = {layer.weight: scaled - scaled.mean(layer.outputs, keepdim=True)}
    if layer.bias:
        bias = model.get_parameter(layer.bias).double() * factor
        values[layer.bias] = bias - bias.mean()
    if writer.factor:
        values[writer.factor] = torch.ones_like(model.get_parameter(writer.factor))
    return values
