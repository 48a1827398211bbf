"""What can take an equalizer's statistics over: a convolution, and the bias or batch norm that its constant ends in."""

from __future__ import annotations

__all__ = ["border_of", "fold_chain", "relative_path", "resolve_path"]

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pl_normkit.graph import ModelGraph, Node

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_chain(model: nn.Module, graph: ModelGraph, reader: Node) -> tuple[tuple[str, ...], str]:
    """The layers from the convolution `reader` to the bias or batch norm that can hold what the mean adds, or why there are none.

    Scaling the input of a convolution is scaling its weight. Taking a mean off its input adds a constant to its output, which its bias
    can hold, or a batch norm's running mean, or another convolution in between can hand on.
    """
    chain: list[str] = []
    node = reader
    while True:
        module = model.get_submodule(node.module)
        if isinstance(module, _BatchNorm) and chain:
            if module.running_mean is None or graph.calls[node.module, node.op] > 1:
                return (), f"the batch norm {node.module} keeps no statistics that could take the mean"
            return (*chain, node.module), ""
        obstacle = _why_no_layer(model, module, node)
        if obstacle or (chain and graph.calls[node.module, node.op] > 1):
            return (), obstacle or f"{node.module} runs several times"
        chain.append(node.module)
        assert isinstance(module, _ConvNd)
        if module.bias is not None:
            return tuple(chain), ""
        if len(node.users) != 1:
            return (), f"{node.module} has no bias, and several layers read it"
        node = node.users[0]
        if node.op != "batch_norm" and "conv" not in node.op:
            return (), f"{chain[-1]} has no bias, and no batch norm follows that could take the mean"


def _why_no_layer(model: nn.Module, module: nn.Module, node: Node) -> str:
    if not isinstance(module, _ConvNd):
        return f"{node.module or 'the model'} is no convolution module"
    if isinstance(module, _ConvTransposeNd):
        return f"{node.module} is a transposed convolution, whose taps do not add up to one constant"
    kind = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    if kind is None or type(module).forward is not kind.forward or type(module)._conv_forward is not kind._conv_forward:
        return f"{node.module} is a {type(module).__name__} that computes its weight or padding itself"
    if "weight" not in module._parameters:
        return f"the weight of {node.module} is computed from others (a parametrization)"
    holders = [other for other in model.modules() for held in other._parameters.values() if held is module.weight]
    return f"the weight of {node.module} is shared with another layer" if len(holders) > 1 else ""


def border_of(layer: nn.Module) -> bool:
    """Whether zero padding mixes zeros with the features, so that a folded mean is wrong at the border."""
    assert isinstance(layer, _ConvNd)
    padding = layer.padding
    pads = (padding == "same" and any(size > 1 for size in layer.kernel_size)) if isinstance(padding, str) else any(padding)
    return layer.padding_mode == "zeros" and pads


def relative_path(host: str, target: str) -> str:
    """`target` as seen from `host`: one `..` for each level up. Survives wrapping the model in another module."""
    ours, theirs = host.split("."), target.split(".")
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    return "/".join([*[".."] * (len(ours) - shared), *theirs[shared:]])


def resolve_path(host: str, relative: str) -> str:
    """The inverse of `relative_path`."""
    parts = host.split(".")
    for step in relative.split("/") if relative else []:
        parts = parts[:-1] if step == ".." else [*parts, step]
    return ".".join(parts)
